"""Push the metrics to the Hub as Spaces, one each: `evaluate.load("me/lds")` and a page with the same numbers.

    hf auth login
    python scripts/push_metrics.py --namespace me

A Space that is there is brought up to date, in one commit; one that is up to date is left alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, SpaceCard, get_token
from transformers import HfArgumentParser

from hf_attribution.arguments import option

METRICS = Path(__file__).resolve().parents[1] / "metrics"
NAMES = sorted(path.parent.name for path in METRICS.glob("*/app.py"))


@dataclass
class Arguments:
    """Which metrics, and where to."""

    namespace: str = field(metadata={"help": "User or organisation on the Hub."})
    metrics: list[str] = field(
        default_factory=lambda: list(NAMES), metadata={"help": "Metrics to push.", "choices": NAMES}
    )
    private: bool = option("Make new Spaces private.", False)


def push(api: HfApi, name: str, args: Arguments) -> str:
    """Push one metric.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: A public Space is there, and a private one was asked for.
    """
    repo_id = f"{args.namespace}/{name}"
    card = SpaceCard.load(METRICS / name / "README.md").data
    api.create_repo(repo_id, repo_type="space", space_sdk=card.sdk, private=args.private or None, exist_ok=True)
    if args.private and not api.space_info(repo_id).private:
        raise ValueError(f"{repo_id} is public: make it private in its settings, or leave --private out.")
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=METRICS / name,
        repo_type="space",
        allow_patterns=["*.py", "README.md", "requirements.txt"],
        delete_patterns=["*.py"],
        commit_message="Upload the metric",
    )
    return done.commit_url


def main() -> None:
    """Push the metrics that are asked for."""
    options: Any = (Arguments,)
    (args,) = HfArgumentParser(options).parse_args_into_dataclasses()
    if get_token() is None:
        raise SystemExit("Pushing needs a token with write access: `hf auth login`, or HF_TOKEN.")
    api = HfApi()
    for name in args.metrics:
        print(f"{name}: {push(api, name, args)}")


if __name__ == "__main__":
    main()
