"""What a model is trained on and what is measured: the one place that knows labels, -100, token shift and margin.

A task turns a batch into two vectors with one number per example: `losses`, what training minimises (summed over
an example's target tokens), and `measurement`, the output that scores explain. Everything else in the library
works on those two vectors and never looks at a label.
"""

from hf_attribution.tasks.base import Batch, Measure, PredictionTask, Task
from hf_attribution.tasks.infer import infer_task
from hf_attribution.tasks.labelled import Classification, Regression, label_column
from hf_attribution.tasks.language import CausalLM, MaskedLM, Seq2SeqLM, TokenPrediction

__all__ = [
    "Batch",
    "CausalLM",
    "Classification",
    "MaskedLM",
    "Measure",
    "PredictionTask",
    "Regression",
    "Seq2SeqLM",
    "Task",
    "TokenPrediction",
    "infer_task",
    "label_column",
]
