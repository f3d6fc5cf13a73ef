"""python eval/ablation.py minutes=110   (a sitting; the same command goes on in the next)

Tests whether self-distillation helps, on one task and at one scale: every arm of docs/ablation.md
is pretrained, fine-tuned and rolled out with several training seeds, by the public commands, one at
a time. Stop it as you like. What is done is a line of `records`; the report is written again at the
end of each sitting, or by eval/ablation_report.py. Before anything is run:

    python eval/ablation.py plan=true

A part of it: `only=[vanilla,self_flow] seeds=[0]`. Every key: configs/ablation.yaml.
"""

from pathlib import Path

from selfflow.configs.entry import launch
from selfflow.eval import ablation_report
from selfflow.eval.ablation_config import AblationConfig
from selfflow.eval.ablation_config import check as check_config
from selfflow.eval.ablation_plan import chosen
from selfflow.eval.ablation_records import read_records
from selfflow.eval.ablation_run import run_jobs
from selfflow.eval.ablation_show import show


def check(config: AblationConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    check_config(config)
    ablation_report.check(config)


def main(config: AblationConfig) -> None:
    """Runs what is left of the chosen jobs, then writes the report; or prints the plan."""
    jobs, path = chosen(config), Path(config.records)
    if config.plan:
        return show(config, jobs, read_records(path))
    try:
        run_jobs(config, jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        raise
    finally:
        done = len({job.name for job in jobs} & read_records(path).keys())
        print(f"{done} of {len(jobs)} jobs are done; logs: {Path(config.out, 'logs')}")
        ablation_report.main(config)


if __name__ == "__main__":
    launch(AblationConfig, main, "ablation", check=check)
