"""``trimkv compare``: what a policy costs in quality, on your text."""

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import click

from .. import __version__, fingerprint
from . import loading, outputs, reading, show
from .errors import UserError, mendable, one_line
from .options import model_options, numbers, output_options, overwrite_option, sharing_options
from .partial import Partial, unfinished

ALL = "all"
WORDS = (
    "KL: nats by which predictions differ from the full cache's. same top-1: how often the most probable token is the "
    "same. tokens: the most that a query attended to, as a mean over layers and in the largest layer"
)
SIDE_BY_SIDE = 16  # cells fed token by token at a time on a GPU, which one alone leaves idle; a kill loses so many


@click.command(short_help="Measure what policies cost in quality on your text.")
@click.option("--text", "texts", multiple=True, metavar="FILE...", help="A .txt or .jsonl file, also .gz.")
@click.argument("more_texts", nargs=-1, metavar="")
@click.option("--context", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sequence.")
@click.option(
    "--policies",
    help="Names with commas between, or all: every policy but those whose trained gates or heads are missing.  "
    "[default: trimkv where there are gates; streaming_llm]",
)
@click.option("--budgets", default="64,128", show_default=True, help="Tokens per head, with commas between.")
@click.option("--max-sequences", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences that advance together."
)
@click.option("--stepwise", is_flag=True, help="Feed token by token even where one pass gives the same. Slow.")
@click.option(
    "--output",
    metavar="FILE.json",
    help="Write the JSON to a file, with command, machine and versions. Until all is measured it grows in "
    "FILE.json.part, from which the same command goes on after a kill. A finished file is shown, not measured again.",
)
@click.option("--figure", metavar="FILE", help="Draw KL against budget into a .png, .svg or .pdf file.")
@click.option("--from", "source", metavar="FILE.json", help="Show or draw a saved result; nothing is measured.")
@overwrite_option
@sharing_options
@model_options
@output_options
def compare(**options):
    """Compare policies with the full cache on your text, evicting at every token.

    Every sequence is read by the full model and by each policy at each budget; a token is evicted at every step, so the
    budget is never exceeded. Reported are KL(full || policy) in nats, perplexity and how often the most probable token
    is the same.
    """
    o = SimpleNamespace(**options)
    outputs.check_figure(o.figure, o.overwrite)
    if o.source:
        _show(_saved(o), o)
        return
    policies, budgets = _names(o.policies), _budgets(o)
    paths = [*o.texts, *o.more_texts]
    reading.check(paths)
    outputs.check_file("--output", o.output)
    loading.check_model_name(o.model)
    loading.import_torch()
    left_out, every = [], policies == (ALL,)
    if every:
        policies, left_out = loading.runnable(o.model, o.gates)
    choice = loading.choose(policies, o.model, o.gates, several=o.scope == "head")  # few policies can share
    for budget in budgets:
        loading.check_budget(budget, choice.policies)
    device = loading.pick_device(o.device)
    dtype = loading.pick_dtype(o.dtype, device)
    asked = _asked(() if every else choice.policies, budgets, device, dtype, o)
    _check_held(asked, o)  # another question is refused before anything is loaded
    tokenizer = loading.load_tokenizer(o.model)
    ids = reading.windows(paths, tokenizer, o.context, o.max_sequences)
    model = loading.load_model(o.model, device, dtype, choice.gates, choice.heads)
    if choice.remark:
        loading.note(choice.remark)
    chosen, refused = _fitting(model, choice.policies, budgets[0], every, o.seed)
    made_of = _made_of(asked, model, ids, paths, chosen)
    result = outputs.finished("--output", o.output, made_of, o.overwrite)
    if result is not None:
        loading.note(f"{o.output} holds this comparison, finished: nothing is measured (--overwrite measures anew)")
    _note_left_out(left_out, refused)
    outputs.check_drawn(o.figure, {"made_of": made_of}, o.overwrite)
    if result is None:
        partial = Partial(o.output, made_of, o.overwrite)
        result = {**_measure(model, ids, chosen, budgets, partial, o), "left_out": left_out + refused}
        result["made_of"] = made_of
        partial.finish({**_made_by(device, dtype), **result})
    _show(result, o)


def _show(result: dict, o: SimpleNamespace) -> None:
    if o.as_json:
        show.emit(result)
    else:
        _print(result)
    if o.figure:
        from ..viz.compare import draw

        with mendable((ValueError, OSError), doing=f"--figure {o.figure}"):
            draw(result, o.figure, outputs.mark(result))


def _fitting(model, names: tuple[str, ...], budget, every: bool, seed: int) -> tuple[list, list[dict]]:
    """The policies that this model can be served with. Of ``every`` policy some may be left out; of named ones none."""
    from .. import bounded_cache
    from ..cache.policies import make

    chosen, refused = [], []
    for name in names:
        policy = make(name, seed=seed) if name == "random" else make(name)
        try:
            bounded_cache(model, policy, budget)
        except ValueError as error:  # said here and not within the measurement
            if not every:
                raise UserError(one_line(error)) from error
            refused.append({"policy": name, "reason": one_line(error)})
        else:
            chosen.append(policy)
    if not chosen:
        raise UserError(refused[0]["reason"])
    return chosen, refused


def _note_left_out(untrained: list[dict], refused: list[dict]) -> None:
    reasons = [f"{one['policy']} ({one['reason']})" for one in untrained + refused]
    if reasons:
        mend = "; `trimkv train --method NAME` makes gates and heads, --gates DIR,DIR names them" if untrained else ""
        loading.note(f"left out: {', '.join(reasons)}{mend}")


def _check_held(asked: dict, o: SimpleNamespace) -> None:
    """Refuses what --output, or the unfinished comparison beside it, holds of another question."""
    if o.output and not o.overwrite:
        outputs.finished("--output", o.output, asked, o.overwrite)
        unfinished(o.output, asked)


def _asked(policies: tuple[str, ...], budgets, device: str, dtype: str, o: SimpleNamespace) -> dict:
    """Of what changes the numbers, all that is known before anything is loaded.

    Args:
        policies: none where the model must be seen to know which.
    """
    from ..train.made_of import versions

    known = {"policies": list(policies)} if policies else {}
    return {
        "command": "compare",
        "model": o.model,
        "context": o.context,
        **known,
        "budgets": [budget.tokens for budget in budgets],
        **{name: getattr(o, name) for name in ("scope", "split", "floor", "seed", "stepwise")},
        "device": device,
        "dtype": dtype,
        "versions": {**versions(), "trimkv": __version__},
    }


def _made_of(asked: dict, model, ids, paths: list[str], policies) -> dict:
    """All that changes the numbers."""
    from ..train.made_of import of_trained_parts, of_weights

    names = ", ".join(dict.fromkeys(Path(path).name for path in paths))
    return {
        **asked,
        "policies": [policy.name for policy in policies],
        "text": {"name": names, "digest": fingerprint.of_tensors([ids]), "sequences": len(ids)},
        "weights": of_weights(model),
        "trained": of_trained_parts(model),
    }


def _measure(model, ids, policies, budgets, partial: Partial, o: SimpleNamespace) -> dict:
    """All cells, each saved when it is there."""
    from ..eval.compare import compare as run

    options = {"batch_size": o.batch_size, "name": o.model, "stepwise": o.stepwise}
    together = SIDE_BY_SIDE if model.device.type == "cuda" else 1
    pieces = list(_pieces(policies, budgets, partial.rows, together, o))
    with loading.quiet(), show.progress() as progress:
        for i, (some, at) in enumerate(pieces):
            start, what = time.perf_counter(), "comparing" if len(some) > 1 else f"comparing {some[0].name}"
            count = f" ({i + 1} of {len(pieces)})" if len(pieces) > 1 else ""
            measured = run(model, ids, some, at, progress=progress(what + count), **options)
            partial.add(measured.as_dict(), time.perf_counter() - start)
    found = partial.rows
    return {
        **partial.found,
        "rows": [found[policy.name, budget.tokens] for policy in policies for budget in budgets],
        "scope": o.scope,
        "split": o.split,
        "floor": o.floor,
        "seed": o.seed,
        "seconds": round(partial.seconds, 1),
        "keep_all_tokens": [policy.name for policy in policies if not policy.bounded],
    }


def _pieces(policies, budgets, done: dict, together: int, o: SimpleNamespace) -> Iterator[tuple[list, list]]:
    """Policies and budgets that are measured together. Where nothing is saved that is all of them. Else each policy
    whose budgets share one forward pass per text, and ``together`` cells of the others, which are fed token by token.
    """
    from ..cache.replay import replayable

    if not o.output:
        yield list(policies), list(budgets)
        return
    by_token = {}  # missing budgets -> policies
    for policy in policies:
        missing = [budget for budget in budgets if (policy.name, budget.tokens) not in done]
        one_cell = not (policy.bounded or policy.selects)
        if missing and (one_cell or not o.stepwise and all(replayable(policy, budget) for budget in missing)):
            yield [policy], missing
        elif missing:
            by_token.setdefault(tuple(missing), []).append(policy)
    for missing, some in by_token.items():
        for group in _runs(some, max(1, together // len(missing))):
            yield from ((group, list(at)) for at in _runs(missing, max(1, together // len(group))))


def _runs(items: Sequence, size: int) -> Iterator[Sequence]:
    """Runs of ``size`` items; the last may be shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))


def _names(text: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if text is not None and not names:
        raise UserError("--policies is empty")
    if ALL in names and len(names) > 1:
        raise UserError("--policies all takes every policy: name nothing beside it")
    return tuple(dict.fromkeys(names))


def _budgets(o: SimpleNamespace) -> list:
    from ..budget import Budget

    with mendable():
        return [Budget(number, scope=o.scope, floor=o.floor, split=o.split) for number in numbers(o, "budgets")]


def _saved(o: SimpleNamespace) -> dict:
    """A result that was written by --output."""
    if o.texts or o.more_texts or o.output:
        raise UserError("--from shows what is saved and measures nothing: leave --text and --output out")
    try:
        result = json.loads(Path(o.source).read_text(encoding="utf-8"))
        float(result["full_perplexity"]), result["model"], result["context"], result["sequences"]
        for row in result["rows"]:
            missing = {"policy", "budget", "kl", "perplexity", "top1_agreement", "peak_tokens_per_head"} - set(row)
            if missing:
                raise ValueError(f"a row lacks {', '.join(sorted(missing))}")
    except OSError as error:
        raise UserError(f"--from {o.source}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--from {o.source}: not a result of trimkv compare --output ({one_line(error)})") from error
    outputs.check_drawn(o.figure, result, o.overwrite)
    return result


def _made_by(device: str, dtype: str) -> dict:
    """What it takes to repeat and to judge the numbers."""
    from .provenance import environment

    command = shlex.join(["trimkv", *click.get_current_context().obj.arguments])
    return {"command": command, "environment": environment(), "device": device, "dtype": dtype}


def _print(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = f"perplexity with the full cache: {result['full_perplexity']:.3f}. {WORDS}"
    if selecting := [name for name in result.get("keep_all_tokens", ()) if name != "full"]:
        caption += f"; {', '.join(selecting)}: all tokens are kept, the budget is what is attended to"
    table = Table(
        title=f"{result['model']}: {result['sequences']} sequences of {result['context']:,} tokens", caption=caption
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("budget", "KL\n(nats)", "perplexity", "same\ntop-1", "mean\ntokens", "peak\ntokens"):
        table.add_column(heading, justify="right")
    seen = set()
    for row in result["rows"]:
        unbounded = row["policy"] == "full"
        if unbounded and "full" in seen:
            continue
        seen.add(row["policy"])
        table.add_row(
            row["policy"],
            "all" if unbounded else f"{row['budget']:,}",
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row.get('mean_tokens_per_head', row['peak_tokens_per_head']):,.0f}",
            f"{row['peak_tokens_per_head']:,}",
        )
    Console().print(table)
