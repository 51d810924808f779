"""``load_image``: an upright RGB picture, or an error that says what is wrong."""

from pathlib import Path

import pytest
from PIL import Image

from vlm_budget.errors import ImageError
from vlm_budget.images import load_image

ROTATED = 6  # EXIF: turn by 90 degrees to look at it


def save(image: Image.Image, file: Path, **options: object) -> Path:
    image.save(file, **options)
    return file


def cut(file: Path, share: float) -> Path:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    return file


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    ending = "tiff" if mode == "CMYK" else "png"
    image = load_image(save(Image.new(mode, (7, 5)), tmp_path / f"x.{ending}"))
    assert image.mode == "RGB"
    assert image.size == (7, 5)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (0, 0, 4, 4))
    found = load_image(save(image, tmp_path / "x.png", exif=exif))
    assert found.size == (4, 8)
    assert found.getpixel((1, 1)) == (0, 0, 255)
    assert found.getpixel((1, 6)) == (255, 0, 0)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    found = load_image(save(image, tmp_path / "x.png"))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path: Path) -> None:
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32896, 65535)):
        image.putpixel((x, 0), value)
    found = load_image(save(image, tmp_path / "x.png"))
    assert [found.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    file = save(frames[0], tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_image(file).getpixel((1, 1)) == (255, 0, 0)


def test_a_home_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Image.new("RGB", (3, 2)), tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_image("~/x.png").size == (3, 2)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no file '.*gone\.png'"):
        load_image(tmp_path / "gone.png")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory; pass picture files"):
        load_image(tmp_path)


def test_a_file_of_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError, match="is empty: 0 bytes"):
        load_image(tmp_path / "x.png")


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("a cat")
    with pytest.raises(ImageError, match="not a picture in any format"):
        load_image(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file(tmp_path: Path, ending: str, share: float) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    with pytest.raises(ImageError, match="damaged or truncated|not a picture"):
        load_image(cut(save(noise, tmp_path / f"x.{ending}"), share))


@pytest.mark.parametrize(
    "side", [11, 40]
)  # above Pillow's limit, where it warns, and above twice that, where it raises
def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    file = save(Image.new("1", (side, 10)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=rf"too large: .*{side * 10} pixels.*limit of [12]00 pixels"):
        load_image(file)


def test_the_largest_allowed_picture_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(Image.new("1", (10, 10)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(file).size == (10, 10)


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0byte"])
def test_a_name_no_file_can_have(name: str) -> None:
    with pytest.raises(ImageError):
        load_image(name)
