"""The tasks: which model, which data and which callbacks a command trains with."""

from simmim.lightning_cli import Link, Task, run_task


def pretrain(args: list[str]) -> None:
    """`simmim pretrain {fit,validate,test,predict}`."""
    from simmim import callbacks
    from simmim.data import ImageFolderData
    from simmim.pretrain import SimMIM

    run_task(
        Task(
            name="pretrain",
            model=SimMIM,
            data=ImageFolderData,
            default="pretrain/digits",
            callbacks={
                "reconstructions": callbacks.Reconstructions,
                "probe": callbacks.OnlineProbe,
                "collapse_alarm": callbacks.CollapseAlarm,
                "non_finite": callbacks.StopOnNonFinite,
                "throughput": callbacks.Throughput,
                "progress_bar": callbacks.ProgressBar,
            },
            writers=(callbacks.PredictionWriter,),
        ),
        args,
    )


def classify(args: list[str]) -> None:
    """`simmim classify {fit,validate,test,predict}`."""
    from simmim import callbacks
    from simmim.callbacks.classification import ConfusionMatrix, PredictionTable
    from simmim.classify import Classifier
    from simmim.data.classification import ClassificationData
    from simmim.transfer import channels, image_size

    run_task(
        Task(
            name="classify",
            model=Classifier,
            data=ClassificationData,
            default="classify/finetune_small",
            callbacks={
                "confusion": ConfusionMatrix,
                "non_finite": callbacks.StopOnNonFinite,
                "throughput": callbacks.Throughput,
                "progress_bar": callbacks.ProgressBar,
            },
            writers=(PredictionTable,),
            links={
                "data.img_size": Link(("model.img_size", "model.weights"), image_size),
                "data.in_chans": Link(("model.in_chans", "model.weights"), channels),
                "data.multi_label": Link("model.multi_label"),
            },
        ),
        args,
    )
