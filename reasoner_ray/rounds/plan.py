"""Which jobs a round is made of. Pure: a job's configuration and the number of a round give its phases, and nothing is read.

A round's folder is RUN/round-NN, and a phase's RUN/round-NN/PHASE, a run like any other. Round 0 measures what there is at the
beginning; the recipe ``search`` also makes its first value model there, unless ``search.scorer.args.model`` names one.

    search           samples value | greedy searched   and each round   search policy value | greedy searched
    process_rewards                | greedy judged                      rl labels prm       | greedy judged judged_anew
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reasoner_ray.config import JobConfig, merge_trees, parse_config
from reasoner_ray.errors import ConfigError

Work = Literal["search", "train", "label"]
Model = Literal["policy", "judge"]
Section = Mapping[str, Any]
_SOLUTION_SCORE = {"raw": "mean", "difference": "last", "shaping": "last", "minimum": "min"}
"""What each transform of process rewards drives up, as ``search.steps`` (see ``ProcessReward``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One job of a round."""

    name: str
    work: Work
    config: JobConfig
    sources: tuple[Path, ...] = ()  # results of searches, the newest first, out of which its data are gathered
    extra: tuple[str, ...] = ()  # what the user has it learn besides

    @property
    def learns(self) -> Path:
        """The file that holds what was gathered."""
        return self.config.out / f"{self.name}.jsonl"


def round_folder(config: JobConfig, number: int) -> Path:
    """Where round ``number`` lies."""
    return config.run_dir / f"round-{number:02d}"


def model_after(config: JobConfig, number: int, model: Model) -> str:
    """The policy, or what judges steps (the value model or the process reward model), as round ``number`` leaves it."""
    searching = config.rounds.recipe == "search"
    if model == "policy":
        name = "policy" if searching else "rl"
        return config.model.path if number == 0 else str(round_folder(config, number) / name / "model")
    process = config.scoring.process
    given = config.search.scorer.args.get("model") if searching or process is None else process.args["model"]
    if given is not None and (number == 0 or not (searching or config.rounds.refresh)):
        return str(given)
    return str(round_folder(config, number) / ("value" if searching else "prm") / "model")


def plan(config: JobConfig, number: int) -> list[Phase]:
    """The phases of round ``number`` in their order. Raises ``ConfigError`` naming the phase whose job cannot work."""
    return _search_round(config, number) if config.rounds.recipe == "search" else _reward_round(config, number)


def _search_round(config: JobConfig, number: int) -> list[Phase]:
    rounds, found = config.rounds, {"split": "train", "items": config.rounds.questions, "save_tokens": True}
    first = config.search.scorer.args.get("model") is None  # round 0 makes the first value model
    before, judge = (model_after(config, max(number - 1, 0), model) for model in ("policy", "judge"))
    policy, value = (model_after(config, number, model) for model in ("policy", "judge"))
    sources = [round_folder(config, 0) / "samples"] if first else []
    sources = [round_folder(config, n) / "search" for n in range(number, 0, -1)] + sources
    results = tuple(folder / "search" / "results.jsonl" for folder in sources)
    phases = []
    if number == 0 and first:
        settings = {"method": "self_consistency", "settings": {"paths": rounds.samples}, "stopping": None, "answers": None}
        phases = [
            _search(config, number, "samples", policy, None, **settings, **found),
            _learn(config, number, "value", "value", policy, sources=results),
        ]
    elif number:
        phases = [
            _search(config, number, "search", before, judge, **found),
            _learn(config, number, "policy", "sft", before, sources=results),
            _learn(config, number, "value", "value", judge, sources=results),
        ]
    return [*phases, _greedy(config, number, policy), _search(config, number, "searched", policy, value)]


def _reward_round(config: JobConfig, number: int) -> list[Phase]:
    process, rounds = config.scoring.process, config.rounds
    assert process is not None  # see rounds_problems
    before, judge = (model_after(config, max(number - 1, 0), model) for model in ("policy", "judge"))
    policy, fresh = (model_after(config, number, model) for model in ("policy", "judge"))
    plain = process.model_dump(mode="json")
    separator = config.rollout.max_new_tokens if plain["separator"] is None else plain["separator"]  # null: an answer is one step
    settings = {
        "method": "best_of_n",
        "settings": {"paths": rounds.samples},
        "separator": separator,
        "steps": _SOLUTION_SCORE[process.transform],
        "stopping": None,
    }
    args = {key: value for key, value in process.args.items() if key != "model"}

    def judged(name: str, model: str) -> Phase:
        return _search(config, number, name, policy, model, **settings, scorer={"name": "prm", "args": {**args, "model": model}})

    measured = [_greedy(config, number, policy), judged("judged", judge)]
    if number == 0:
        return measured
    with_judge = {**plain, "args": {**args, "model": judge}}
    rl = _phase(config, number, "rl", "train", "rl", {"model": {"path": before}, "scoring": {"process": with_judge}})
    if not rounds.refresh:
        return [rl, *measured]
    sections: dict[str, Section] = {"model": {"path": policy}, "scoring": {"process": None}, "labels": {"separator": separator}}
    labels = _phase(config, number, "labels", "label", "rl", sections)
    data = [str(round_folder(config, n) / "labels" / "labels" / f"labels.{labels.config.labels.format}") for n in range(number, 0, -1)]
    return [rl, labels, _learn(config, number, "prm", "prm", judge, data=data), *measured, judged("judged_anew", fresh)]


def _search(config: JobConfig, number: int, name: str, policy: str, judge: str | None, **search: Any) -> Phase:
    """Searches with ``policy``, guided by ``judge`` where there is one."""
    args = config.search.scorer.args if judge is None else {**config.search.scorer.args, "model": judge}
    scorer = {"name": "likelihood", "args": {}} if judge is None else {"name": "prm", "args": args}
    sections: dict[str, Section] = {
        "model": {"path": policy},
        "scoring": {"process": None},
        "search": {"scorer": scorer, **search},
    }
    return _phase(config, number, name, "search", "rl", sections)


def _greedy(config: JobConfig, number: int, policy: str) -> Phase:
    """The bare policy on the held-out questions."""
    plain: Section = {"method": "greedy", "settings": {}, "budget": {}, "stopping": None, "answers": None, "save_trees": False}
    return _search(config, number, "greedy", policy, None, **plain)


def _learn(
    config: JobConfig, number: int, name: str, kind: str, model: str, *, sources: tuple[Path, ...] = (), data: list[str] | None = None
) -> Phase:
    """Supervised training that goes on from ``model``."""
    own = config.rounds.phases.get(name, {}).get("supervised", {})
    extra = tuple(own.get("data", ())) if isinstance(own, dict) else ()
    found = [str(round_folder(config, number) / f"{name}.jsonl")] if data is None else data
    head: Section = {"critic": "none"} if kind == "sft" else {"critic": "joint", "critic_hidden": []}
    sections: dict[str, Section] = {
        "model": {"path": model},
        "learner": {**head, "updates_per_step": 1, "epochs": 1, "critic_warmup": 0, "max_kl": None},
        "trainer": {} if kind == "sft" else {"eval_samples": 0},
        "rollout": {"temperature": 1.0},
        "scoring": {"process": None},
    }
    return _phase(config, number, name, "train", kind, sections, sources=sources, extra=extra, data=[*found, *extra])


def _phase(
    config: JobConfig,
    number: int,
    name: str,
    work: Work,
    kind: str,
    sections: Mapping[str, Section],
    *,
    sources: tuple[Path, ...] = (),
    extra: tuple[str, ...] = (),
    data: list[str] | None = None,
) -> Phase:
    """This job with ``sections`` changed key by key, and over them what ``rounds.phases`` says of the phase."""
    tree = config.model_dump(mode="json", exclude={"rounds"})
    own = config.rounds.phases.get(name, {})
    for forbidden in ("name", "out", "kind", "rounds"):
        if forbidden in own:
            raise ConfigError(f"rounds.phases.{name}.{forbidden}: is the loop's own; leave it out")
    tree |= {"kind": kind, "name": name, "out": str(round_folder(config, number))}
    for section, values in {"tracking": {"wandb": "off"}, **sections}.items():  # the loop's own run is the one that W&B sees
        tree[section] = {**tree[section], **values}
    search = own.get("search", {})
    if isinstance(search, dict) and search.get("method", tree["search"]["method"]) != tree["search"]["method"]:
        tree["search"]["settings"] = {}  # those of another method
    tree = merge_trees(tree, own)
    if data is not None:
        tree["supervised"]["data"] = data
    try:
        return Phase(name=name, work=work, config=parse_config(tree), sources=sources, extra=extra)
    except ConfigError as error:
        raise ConfigError(f"rounds.phases.{name}: {error}") from error
