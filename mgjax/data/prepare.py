"""Prepares a TFDS dataset in the format that mgjax reads, array_record. Needs TensorFlow, once.

    python -m mgjax.data.prepare NAME [--data_dir DIR] [--manual_dir DIR]

NAME is as in `tfds:NAME`, such as cifar100 or imagenet_resized/64x64. Datasets that TFDS may not download itself, such as
imagenet2012, are put by hand into --manual_dir.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from absl import app, flags

from mgjax.data.sources import DataError
from mgjax.errors import InputError


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> str:
    """Downloads and prepares a dataset.

    Args:
        name: of the dataset.
        data_dir: folder of prepared datasets (empty: ~/tensorflow_datasets).
        manual_dir: folder of what was downloaded by hand.

    Returns:
        The folder of the prepared dataset.

    Raises:
        DataError: TensorFlow is not installed, TFDS does not know the name, or cannot prepare it.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            "preparing a dataset needs TensorFlow (reading it does not): "
            "pip install 'mgjax[prepare]', in a checkout '.[prepare]'"
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise DataError(f"TFDS knows no dataset '{name}': https://www.tensorflow.org/datasets/catalog lists them") from None
    except ValueError as error:  # an unknown config or version
        raise DataError(f"TFDS cannot build '{name}': {_line(error)}") from None
    config = tfds.download.DownloadConfig(manual_dir=manual_dir) if manual_dir else None
    try:
        builder.download_and_prepare(download_config=config)
    except (AssertionError, OSError) as error:  # TFDS asserts that what is downloaded by hand is there
        raise DataError(
            f"'{name}' cannot be prepared: {_line(error)} (--manual_dir names what was downloaded by hand)"
        ) from None
    return str(builder.data_dir)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def main(argv: Sequence[str]) -> None:
    try:
        if len(argv) != 2:
            given = f"got {' '.join(argv[1:])}" if argv[1:] else "none was given"
            raise DataError(f"one dataset is named, {given}: python -m mgjax.data.prepare NAME [--data_dir DIR]")
        print(f"prepared: {prepare(argv[1], flags.FLAGS.data_dir, flags.FLAGS.manual_dir)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", "", "folder of prepared datasets (empty: ~/tensorflow_datasets)")
    flags.DEFINE_string("manual_dir", "", "folder of what was downloaded by hand")
    app.run(main, flags_parser=_parse)
