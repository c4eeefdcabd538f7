"""``trimkv policies``: who can decide."""

import click

from . import show
from .options import output_options


@click.command(short_help="List the policies that decide what is kept.")
@output_options
def policies(as_json: bool):
    """List the policies that decide which tokens are kept."""
    from ..cache.policies import POLICIES

    rows = [
        {
            "name": name,
            "needs": sorted(policy.needs),
            "trained": policy.trained,
            "source": policy.source,
            "description": (policy.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " "),
        }
        for name, policy in POLICIES.items()
    ]
    if as_json:
        show.emit({"policies": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("policy", "needs", "trained")
    table.add_column("what it keeps", ratio=3)
    table.add_column("source", ratio=2, overflow="fold")
    for row in rows:
        needs = ", ".join(row["needs"]) or "positions"
        table.add_row(row["name"], needs, "yes" if row["trained"] else "no", row["description"], row["source"])
    Console().print(table)
