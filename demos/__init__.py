"""Demos: small web apps that show what a budget does to an image, a video and an answer.

Here will live the Gradio apps, one file each, and nothing that another folder needs: they are the top floor.
They need the ``demos`` extra, ``pip install 'vlm-budget[demos]'``.
"""
