"""Hub datasets as folders: parquet files with the card that names their configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from public_records import write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes rows as a hub dataset: parquet files and, for configurations, the card that names them."""
    datasets = pytest.importorskip("datasets", reason="hub datasets are read with datasets: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def save(split: str, **configurations: list[dict[str, Any]]) -> Path:
        folder = tmp_path / "mirror"
        card = []
        for name, rows in configurations.items():
            name = name.replace("__", "-")
            table = datasets.Dataset.from_list(rows)
            if "image" in rows[0]:
                table = table.cast_column("image", datasets.Image())
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True)
            table.to_parquet(str(path))
            card.append(f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}-*\n")
        write(folder / "README.md", f"---\nconfigs:\n{''.join(card)}---\n")
        return folder

    return save
