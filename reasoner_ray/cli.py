"""The ``reasoner`` command. Heavy imports happen after parsing, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reasoner_ray.errors import ReasonerError

if TYPE_CHECKING:
    from reasoner_ray.trainer.launch import IfExists

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
    choice = _choice(resume, overwrite, if_exists)
    from reasoner_ray.trainer.launch import train as run

    run(config, choice)


@app.command(name="eval")
def evaluate(
    job: JobArgument,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="model to evaluate, for example runs/quickstart/model")] = None,
) -> None:
    """Accuracy on the job's held-out prompts: `reasoner eval jobs/quickstart.yaml --model runs/quickstart/model`.

    Of one greedy answer each, or of trainer.eval_samples=N answers that are sampled as in training.
    Of kind prm and value: AUC and accuracy on held-out steps, and the first-error F1 of supervised.processbench. Of kind mat: the
    return of greedy episodes from fixed seeds with its 95 % interval, of RUN/model without --model; one is drawn as RUN/`tracking.video`.
    """
    from reasoner_ray.config import load_config
    from reasoner_ray.trainer.launch import evaluate as run

    config = load_config(job, [*(overrides or []), *([f"model.path={model}"] if model else [])])
    for name, value in run(config, model).items():
        typer.echo(f"{name}: {value:.4g}")


@app.command()
def search(
    job: Annotated[Path | None, typer.Argument(help="a job's YAML, for example jobs/search/arithmetic_mcts.yaml")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="policy to search with, for example runs/quickstart/model")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the items that have no result yet")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete an existing search of this name")] = False,
    if_exists: Annotated[str, typer.Option(help="what to do with an existing search: error, resume, overwrite, new")] = "error",
    methods: Annotated[bool, typer.Option("--list", help="list the methods and their settings, then stop")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="results.jsonl of self_consistency: print the stopping threshold it calls for, then stop")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="accuracy that --calibrate may lose against all samples")] = 0.01,
) -> None:
    """Search for answers at test time: `reasoner search jobs/search/arithmetic_mcts.yaml search.method=beam`.

    Writes RUN/search/results.jsonl, one line an item, and prints accuracy with every cost.
    """
    from reasoner_ray.config import load_config
    from reasoner_ray.search.methods import describe_methods

    if methods:
        typer.echo(describe_methods())
        return
    if job is None:
        raise typer.BadParameter("give a job, for example jobs/search/arithmetic_mcts.yaml")
    config = load_config(job, [*(overrides or []), *([f"model.path={model}"] if model else [])])
    choice = _choice(resume, overwrite, if_exists)
    from reasoner_ray.search.run import calibrate_stopping
    from reasoner_ray.search.run import search as run

    if calibrate is not None:
        for name, value in asdict(calibrate_stopping(config, calibrate, tolerance)).items():
            typer.echo(f"{name}: {value if name == 'threshold' else format(value, '.4g')}")  # stopping compares with it to the last digit
        return
    run(config, choice)


@app.command()
def label(
    job: JobArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the questions that are not labelled yet")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete existing labels of this name")] = False,
) -> None:
    """Label the steps of a task's solutions: `reasoner label jobs/labels/game24_omega.yaml labels.items=100`.

    Writes RUN/labels/labels.jsonl (or .parquet), one record a solution, which `kind: prm` trains on, and a report. A run that was
    interrupted or killed goes on with `--resume`: no question is lost or labelled twice.
    """
    from reasoner_ray.config import load_config
    from reasoner_ray.labels.launch import label as run

    run(load_config(job, overrides), "resume" if resume else "overwrite" if overwrite else "error")


@app.command(name="convert-labels")
def convert_labels(
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help="prm800k, math-shepherd, math-aps or math-aps-tree")],
    files: Annotated[list[Path], typer.Argument(help="JSON lines, plain or gzip")],
    out: Annotated[Path, typer.Option(help="the file of JSON lines to write")] = Path("labels.jsonl"),
    target: Annotated[str, typer.Option(help="what `labels` holds: soft or hard")] = "soft",
    once: Annotated[bool, typer.Option("--once", help="label a step that several solutions share in the first of them alone")] = False,
    neutral_is_bad: Annotated[bool, typer.Option("--neutral-is-bad", help="prm800k: a rating of 0 is a wrong step")] = False,
    step_prefix: Annotated[bool, typer.Option("--step-prefix", help="write `Step 1: ` before each step")] = False,
) -> None:
    """Published process labels as records for `kind: prm`: `reasoner convert-labels prm800k phase2_train.jsonl --out prm800k.jsonl`."""
    from reasoner_ray.labels.converters import Options, convert

    if target not in ("soft", "hard"):
        raise typer.BadParameter(f"--target {target}: choose soft or hard")
    options = Options(target=target, once=once, neutral_is_bad=neutral_is_bad, step_prefix=step_prefix)  # type: ignore[arg-type]
    counts = convert(kind, files, out, options)
    typer.echo(f"{out}: {counts['written']} solutions of {counts['read']} records; {counts['left_out']} records left out")


@app.command()
def collect(job: JobArgument, overrides: Overrides = None) -> None:
    """Record a policy's episodes as a Minari data set: `reasoner collect jobs/sequence/key_to_door_dt.yaml sequence.collect.out=DIR-v0`.

    The policy is `random`, the folder model/ of a run of kind sequence or mat (a team of one), module:function of your own, or `replay`:
    what an Online-DT run (sequence.collect.run) learns from.

    Of a job of kind rl: scored episodes of its language model as records for kind sft (`supervised.data`), one an action:
    `reasoner collect jobs/agents/tomato_salad.yaml rollout.collect.out=episodes.jsonl`. Started again, it goes on where it was cut short.
    """
    from reasoner_ray.config import load_config

    config = load_config(job, overrides)
    if config.kind == "rl":
        from reasoner_ray.rollout.collect import collect as run
    else:
        from reasoner_ray.agents.sequence.collect import collect as run
    for name, value in run(config).items():
        typer.echo(f"{name}: {value:.6g}")


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
    runs: Annotated[
        list[Path], typer.Argument(help="folders of runs (those that differ only in their seed become one band), or a tree.json")
    ],
    out: Annotated[
        Path | None, typer.Option(help="the PNG to write; else curves.png, or tree.png beside a tree.json; of kind agdc also a .gif")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="a metric, for example eval/accuracy; may be repeated")] = None,
    smooth: Annotated[int, typer.Option(help="points of a running mean over training metrics")] = 1,
    x: Annotated[str, typer.Option(help="steps, minutes, or actions (of agents in environments)")] = "steps",
) -> None:
    """Draw learning curves: `reasoner plot runs/a runs/b --out curves.png`; or a search tree: `reasoner plot tree.json`.

    `reasoner plot runs/agdc-ppo --out search.gif` animates an episode of what a run of kind agdc has learnt.
    """
    if any(run.suffix == ".json" for run in runs):
        from reasoner_ray.search.draw import plot_tree

        if len(runs) > 1:
            raise typer.BadParameter("one tree a picture: give one tree.json and nothing else")
        picture = out or runs[0].with_suffix(".png")
        typer.echo(f"{picture}: {plot_tree(runs[0], picture)}")
        return
    if out is not None and out.suffix == ".gif":
        from reasoner_ray.agents.agdc.launch import animate_run

        if len(runs) > 1:
            raise typer.BadParameter("one run an animation: give one folder and nothing else")
        typer.echo(f"written to {out}: {animate_run(runs[0], out)}")
        return
    from reasoner_ray.plot import plot_runs

    out = out or Path("curves.png")
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
def algorithm(name: Annotated[str | None, typer.Argument(help="for example poad; none: a line on each")] = None) -> None:
    """Explain an algorithm: its estimator, when to use it, how it fails, and its settings with their defaults."""
    from reasoner_ray.algorithms import describe_algorithm, list_algorithms

    typer.echo(list_algorithms() if name is None else describe_algorithm(name))


def _choice(resume: bool, overwrite: bool, if_exists: str) -> IfExists:
    choice = "resume" if resume else "overwrite" if overwrite else if_exists
    if choice not in ("error", "resume", "overwrite", "new"):
        raise typer.BadParameter(f"--if-exists {choice}: choose error, resume, overwrite or new")
    return choice  # type: ignore[return-value]


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
