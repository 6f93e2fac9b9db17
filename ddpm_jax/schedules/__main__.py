"""How much signal a noise schedule leaves at T: python -m ddpm_jax.schedules --schedule=cosine --out=cosine.png"""

import dataclasses
import sys

from ddpm_jax import errors, options
from ddpm_jax.run.files import expand, write_atomic
from ddpm_jax.schedules import make_schedule
from ddpm_jax.schedules.report import check_terminal_snr, report


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    schedule: str = options.option("linear", "a name in SCHEDULES or CURVES")
    T: int = options.option(1000, "steps of a discrete schedule", options.at_least(1))
    zero_terminal_snr: bool = options.option(False, "leave no signal at T")
    resolution: int = options.option(64, "side of the images", options.at_least(1))
    base_resolution: int = options.option(0, "side that the schedule is designed for; 0 for any", options.at_least(0))
    out: str = options.option("", "PNG file for a plot of the schedule; needs matplotlib")


def main(argv=None):
    args = vars(options.parse(Args, argv, "-m ddpm_jax.schedules", __doc__))
    out, name = args.pop("out"), args.pop("schedule")
    schedule = make_schedule(name, **args)
    for key, value in report(schedule).items():
        print(f"{key:<14}{value:.6g}" + (" bits/dim at most" if key == "prior_kl" else ""))
    check_terminal_snr(schedule)
    if out:
        from ddpm_jax.plots import figures

        with errors.writing(f"--out={out}"):
            write_atomic(expand(out), figures.png(figures.schedule(schedule)))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
