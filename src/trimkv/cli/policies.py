"""``trimkv policies``: who can decide."""

import click

from . import show
from .errors import UserError
from .options import output_options

# In a line; a policy that is not here has its description's first sentence.
KEEPS = {
    "full": "everything: the reference",
    "trimkv": "what a trained gate gave long life",
    "streaming_llm": "the first 4 tokens and the newest",
    "streaming_llm_cache": "the same, positions within the cache",
    "h2o": "what got most attention; half is recent",
    "h2o_normalised": "what got most attention on average",
    "tova": "what the last query attended to",
    "keydiff": "keys that point away from the others",
    "knorm": "the shortest keys",
    "lagkv": "what varies most, by what follows",
    "snapkv": "what the last 32 queries attend to",
    "r_kv": "what the last 8 attend to, not said twice",
    "locret": "what a trained retaining head values most",
    "seer_attention_r": "all; attends to blocks that a gate picks",
    "expected_attention": "what queries to come are expected to want",
    "expected_attention_32": "the same, looking 32 positions ahead",
    "random": "chance: the floor that a method has to beat",
}
WIDTH = 45  # of what a line says
LAYER = {"Q": 9, "H": 3, "D": 64}  # whose state is counted: one of smollm2's 30


@click.command(short_help="List the policies that decide what is kept, or explain one.")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@output_options
def policies(names: tuple[str, ...], as_json: bool):
    """List the policies that decide which tokens are kept. With names, explain these: what a token is worth, when it is
    evicted, how much is attended to at most, what the policy stores, its source, and where and why it deviates."""
    from ..cache.policies import POLICIES

    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise UserError(f"unknown policy {unknown[0]!r}; known policies: {', '.join(POLICIES)}")
    rows = [_row(name, POLICIES[name]) for name in dict.fromkeys(names or POLICIES)]
    if as_json:
        show.emit({"policies": rows})
    elif names:
        _explain(rows)
    else:
        _list(rows)


def _list(rows: list[dict]) -> None:
    for name, keeps, needs in [("policy", "keeps", "needs"), *((r["name"], r["summary"], r["asks"]) for r in rows)]:
        keeps = keeps if len(keeps) < WIDTH else keeps[: WIDTH - 2] + "…"
        click.echo(f"{name:<22}{keeps:<{WIDTH}}{needs}")
    click.echo(show.faint("\n`trimkv policies NAME` explains one."))


def _explain(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for row in rows:
        needs = ", ".join(row["needs"]) or "positions"
        trained = ", trained" if row["trained"] else ""
        console.print(Text.assemble((row["name"], "bold"), f"  needs {needs}{trained}"))
        lines = [row["description"], f"Score: {row['score']}.", f"Evicts {row['evicts']}."]
        lines += [f"Attends to {row['peak_decode']}; within a prompt to {row['peak_prefill']}. State: {row['state']}."]
        lines += [f"Deviates: {row['deviations']}"] if row["deviations"] else []
        lines += [f"--profile paper: {row['published']}."] if row["published"] else []
        lines += [f"Source: {row['source']}"]
        console.print(Padding(Text("\n".join(lines), style="dim"), (0, 0, 1, 2)))
    if any("M" in row["peak_decode"] for row in rows):
        console.print("M is the budget: slots per layer and KV head.", style="dim")


def _row(name: str, policy: type) -> dict:
    per_slot = sum(dtype.itemsize for dtype in policy.state.values())
    per_layer = policy().extra_bytes(0, **LAYER)
    state = f"{per_slot} B per slot" if per_slot else "none"
    if per_layer:
        state = f"{per_layer:,} B per layer (smollm2)" + (f", {state}" if per_slot else "")
    description = " ".join((policy.__doc__ or "").strip().split("\n\n")[0].split())
    return {
        "name": name,
        "needs": sorted(policy.needs),
        "trained": policy.trained,
        "source": policy.source,
        "description": description,
        "summary": KEEPS.get(name) or description.split(". ")[0].rstrip("."),
        "asks": _asks(policy),
        "score": policy.formula,
        "evicts": policy.evicts,
        "peak_decode": policy.peak_decode,
        "peak_prefill": policy.peak_prefill,
        "state": state,
        "state_bytes_per_slot": per_slot,
        "state_bytes_per_layer": per_layer,
        "deviations": policy.deviations,
        "published": _published(policy),
    }


def _asks(policy: type) -> str:
    """What somebody must have to use a policy: trained parts, or nothing; and what makes it slower."""
    if policy.trained:
        return "trained heads" if policy.head else "trained gates"
    return "attention" if "attention" in policy.needs else "nothing"


def _published(policy: type) -> str:
    """What --profile paper changes, in words."""
    form = policy.published
    if form is None:
        return ""
    said = [f"as {form.name}"] if form.name else []
    said += [f"{option}={value}" for option, value in form.options.items()]
    said += ["a prompt attends in full and evicts after it"] if form.whole_prompt else []
    if form.buffer:
        said.append("attends before it evicts" if form.buffer == 1 else f"evicts every {form.buffer} tokens")
    return ", ".join(said)
