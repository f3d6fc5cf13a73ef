"""python worldmodel/estimate.py model=selfflow_675m gpus=8

Prints what a training run will cost: parameters, FLOPs, activations, memory of a GPU, tokens/s at a
given MFU, hours. It takes every key of worldmodel/train.py, and those of configs/estimate.yaml.
The numbers are arithmetic (cost.py, activations.py, plan.py); nothing is run or written.
"""

from dataclasses import dataclass

from selfflow.configs.entry import launch
from selfflow.worldmodel.plan import Cluster, report
from selfflow.worldmodel.train_config import TrainConfig


@dataclass(frozen=True)
class EstimateConfig(TrainConfig):
    """Every key of configs/estimate.yaml, which explains them."""

    gpus: int = 8
    gpu_memory: float = 80.0
    reserve: float = 0.1
    mfu: float = 0.4
    peak_flops: float = 989e12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % (self.cluster.gpus * self.accumulate):
            raise ValueError(
                f"batch={self.batch} does not divide by gpus={self.gpus} x "
                f"accumulate={self.accumulate}"
            )

    @property
    def cluster(self) -> Cluster:
        """What the run is planned on."""
        return Cluster(self.gpus, self.gpu_memory, self.reserve, self.mfu, self.peak_flops)


def main(config: EstimateConfig) -> None:
    """Prints the tables and the plan."""
    report(config, config.cluster)


if __name__ == "__main__":
    launch(EstimateConfig, main, "estimate")
