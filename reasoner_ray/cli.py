"""The ``reasoner`` command. Heavy imports happen after parsing, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from reasoner_ray.errors import ReasonerError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

JobArgument = Annotated[Path, typer.Argument(help="a job's YAML, for example jobs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="overrides, for example trainer.steps=40 learner.lr=1e-5")]


@app.command()
def train(
    job: JobArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved configuration and every derived number, then stop")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest complete checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete an existing run of this name")] = False,
    if_exists: Annotated[str, typer.Option(help="what to do with an existing run: error, resume, overwrite, new")] = "error",
) -> None:
    """Train a model: `reasoner train jobs/quickstart.yaml trainer.steps=40 seed=1`.

    Writes RUN/metrics.jsonl, RUN/checkpoints/ and, at the end, RUN/model (a plain Hugging Face folder).
    Ctrl-C checkpoints and ends; `--resume` goes on.
    """
    from reasoner_ray.config import derived_numbers, load_config, to_yaml

    config = load_config(job, overrides)
    if dry_run:
        typer.echo(to_yaml(config))
        typer.echo("# derived")
        for name, value in derived_numbers(config).items():
            typer.echo(f"# {name}: {value}")
        return
    choice = "resume" if resume else "overwrite" if overwrite else if_exists
    if choice not in ("error", "resume", "overwrite", "new"):
        raise typer.BadParameter(f"--if-exists {choice}: choose error, resume, overwrite or new")
    from reasoner_ray.trainer.launch import train as run

    run(config, choice)  # type: ignore[arg-type]


@app.command(name="eval")
def evaluate(
    job: JobArgument,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="model to evaluate, for example runs/quickstart/model")] = None,
) -> None:
    """Greedy accuracy on the job's held-out prompts: `reasoner eval jobs/quickstart.yaml --model runs/quickstart/model`."""
    from reasoner_ray.config import load_config
    from reasoner_ray.trainer.launch import evaluate as run

    config = load_config(job, [*(overrides or []), *([f"model.path={model}"] if model else [])])
    for name, value in run(config).items():
        typer.echo(f"{name}: {value:.4g}")


@app.command()
def submit(
    job: JobArgument,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="Ray's dashboard on the head node")] = "http://127.0.0.1:8265",
    if_exists: Annotated[str, typer.Option(help="what to do with an existing run: error, resume, overwrite, new")] = "error",
    include: Annotated[list[Path] | None, typer.Option(help="a module of your own to ship; may be repeated")] = None,
    follow: Annotated[bool, typer.Option(help="follow the job's output until it ends")] = True,
) -> None:
    """Run a job on a Ray cluster: `reasoner submit jobs/gsm8k_1p5b_8gpu.yaml --address http://HEAD:8265 out=/shared/runs`.

    Ctrl-C asks the job to write a checkpoint and end; `--if-exists resume` goes on.
    """
    from reasoner_ray.submit import submit as run

    raise typer.Exit(run(job, overrides or [], address=address, if_exists=if_exists, include=include or [], follow=follow))


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; those that differ only in their seed become one band")],
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("curves.png"),
    metric: Annotated[list[str] | None, typer.Option(help="a metric, for example eval/accuracy; may be repeated")] = None,
    smooth: Annotated[int, typer.Option(help="points of a running mean over training metrics")] = 1,
    x: Annotated[str, typer.Option(help="steps, minutes, or actions (of agents in environments)")] = "steps",
) -> None:
    """Draw learning curves: `reasoner plot runs/a runs/b --out curves.png`."""
    from reasoner_ray.plot import plot_runs

    if x not in ("steps", "minutes", "actions"):
        raise typer.BadParameter(f"--x {x}: choose steps, minutes or actions")
    drawn = plot_runs(runs, out, metric, smooth, x)  # type: ignore[arg-type]
    typer.echo(f"{out}: {', '.join(drawn)}")


@app.command()
def play(
    environment: Annotated[str, typer.Argument(help="an environment, for example FoodPreparation, or module:Class of your own")],
    arguments: Annotated[list[str] | None, typer.Argument(help="what it is made with, for example wording=cheese")] = None,
    seed: Annotated[int, typer.Option(help="of the episode")] = 0,
) -> None:
    """Play an environment yourself: `reasoner play TomatoSalad`. A number or the text of an action; q ends it."""
    from reasoner_ray.config import read_arguments
    from reasoner_ray.envs.play import play as run

    run(environment, read_arguments(arguments or []), seed=seed)


@app.command()
def doctor(model: Annotated[str, typer.Option(help="The model to look for, named as in model.path.")] = "builtin:smollm2-135m") -> None:
    """Check this machine: one line a component, each with the command that mends it. Exit code 1 where training cannot run."""
    from reasoner_ray.doctor import run_doctor

    raise typer.Exit(run_doctor(model))


@app.command()
def algorithm(name: Annotated[str, typer.Argument(help="for example poad")]) -> None:
    """Explain an algorithm: its estimator, when to use it, how it fails, and its settings with their defaults."""
    from reasoner_ray.algorithms import describe_algorithm

    typer.echo(describe_algorithm(name))


def main() -> None:
    """Entry point: an error the user can mend is printed as text, everything else keeps its stack."""
    try:
        app()
    except ReasonerError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
