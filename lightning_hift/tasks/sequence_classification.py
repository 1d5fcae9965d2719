"""Classes or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanSquaredError, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import Accuracy, F1Score, MatthewsCorrCoef
from typing_extensions import override

from lightning_hift.tasks.metric_precision import full_precision
from lightning_hift.tasks.transformer import TransformerModule, label_names, warn_of_other_order


class SequenceClassification(TransformerModule):
    """Trains ``AutoModelForSequenceClassification`` to classify texts, or to score them.

    A batch is a mapping of ``input_ids`` and ``attention_mask``, shape (batch, length), whatever else the network
    takes, and ``labels``, shape (batch,): class indices, or floats for regression.

    Logs ``val_loss`` (cross-entropy, or the squared error) and ``val_accuracy``, ``val_f1`` (of class 1 if there are
    two classes, else the mean over all), ``val_matthews``; for regression ``val_pearson``, ``val_spearman``,
    ``val_mse``. With ``test_`` in a test.

    Args:
        labels: Names of the classes, or their number; default: those of the data module, or of ``model``.
        regression: Predict one number instead of a class.
        kwargs: See ``TransformerModule``.

    Raises:
        ValueError: See ``TransformerModule``; or ``labels`` are given for a regression, or fewer than two.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, *, labels: list[str] | int | None = None, regression: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if regression and labels is not None:
            raise ValueError(f"Got labels={labels!r} with regression=True, which has none. Leave one of them out.")
        if labels is not None and (labels if isinstance(labels, int) else len(labels)) < 2:
            raise ValueError(f"Got labels={labels!r}; a classification needs at least two. For a number: regression.")
        self.labels = labels
        self.regression = regression

    @override
    def config_fields(self) -> dict[str, Any]:
        of_data = self.of_data("regression", self.regression)
        if of_data != self.regression:
            raise ValueError(
                f"Got regression={self.regression} for the module and regression={of_data} for the data module. Set"
                " both alike: numbers are no classes."
            )
        if self.regression:
            return {"id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
        names = label_names(self, self.labels)
        if names is None:
            return {"problem_type": "single_label_classification"}
        if len(names) < 2:
            raise ValueError(
                f"Got the labels {names} of the data; a classification needs at least two. Name all in label_names of"
                " the data module."
            )
        warn_of_other_order(self.source, self.config, names)
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    @override
    def make_metrics(self) -> dict[str, Metric]:
        if self.regression:
            return {"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef(), "mse": MeanSquaredError()}
        return class_metrics(self._num_labels)

    @override
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        loss: Tensor = self(batch).loss  # with what an adapter such as AdaLoRA adds
        return loss

    @override
    def evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> None:
        # Not the network's own loss, which has the dtype of its weights.
        logits, labels = self._logits(batch), batch["labels"]
        if self.regression:
            predicted = logits.squeeze(-1)
            loss = mse_loss(predicted, labels.to(predicted.dtype))
        else:
            predicted, loss = logits.argmax(-1), cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.metrics[stage].update(predicted, labels)  # type: ignore[operator]

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One record per text: ``label`` and ``probability``, or ``score``."""
        logits = self._logits(batch)
        if self.regression:
            return [{"score": score} for score in logits.squeeze(-1).tolist()]
        probabilities, chosen = logits.softmax(-1).max(-1)
        names = self.network.config.id2label  # type: ignore[union-attr]
        return [
            {"label": names[i], "probability": p}  # type: ignore[index]
            for i, p in zip(chosen.tolist(), probabilities.tolist(), strict=True)
        ]

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Of the classes, shape (batch, classes), or scores, shape (batch, 1)."""
        output = self({name: value for name, value in batch.items() if name != "labels"})
        return full_precision(output.logits)

    @property
    def _num_labels(self) -> int:
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        num_labels: int = self.network.config.num_labels  # type: ignore[union-attr, assignment]
        return num_labels


def class_metrics(num_labels: int) -> dict[str, Metric]:
    """Accuracy, F1 and Matthews' correlation of class indices; F1 of class 1 if there are two, else the mean."""
    binary = num_labels == 2
    f1 = F1Score("binary") if binary else F1Score("multiclass", num_classes=num_labels, average="macro")
    return {
        "accuracy": Accuracy("multiclass", num_classes=num_labels),
        "f1": f1,
        "matthews": MatthewsCorrCoef("multiclass", num_classes=num_labels),
    }
