"""Layers that have unlike shares of a budget: what they hold, what they see, and how the shares are found."""

import json

import pytest
import torch

import tiny
import tiny_text
import trimkv
from trimkv import Budget, Engine, SamplingParams
from trimkv.cli.app import run
from trimkv.eval.compare import compare, compare_stepwise
from trimkv.eval.layer_shares import layer_costs, share_out
from trimkv.gates.attach import new_gates
from trimkv.gates.files import save_gates

SHARES = [1.5, 0.5]


def gated(shares=SHARES):
    """A tiny model of two layers whose gates have shares."""
    model = tiny.gated("qwen3", num_hidden_layers=2)
    gates = trimkv.gates.files.collect(model)
    gates.meta["layer_shares"] = shares
    return trimkv.attach(model, gates)


def capacities(model, budget, policy="trimkv"):
    return [layer.budget.tokens for layer in trimkv.bounded_cache(model, policy, budget).slot_layers]


@pytest.mark.parametrize("seed", range(20))
def test_a_split_budget_has_as_many_slots_as_an_even_one(seed):
    generator = torch.Generator().manual_seed(seed)
    shares = (0.05 + torch.rand(1 + seed * 2, generator=generator)).tolist()
    tokens = int(torch.randint(8, 300, (1,), generator=generator))
    whole = Budget(tokens, sinks=seed % 4, recent=seed % 3, buffer=seed % 5)
    parts = whole.layers(shares)
    assert sum(part.tokens for part in parts) == tokens * len(shares)
    fixed = whole.sinks + whole.recent
    free = tokens - fixed
    for part, share in zip(parts, shares, strict=True):
        assert part.tokens > fixed and (part.sinks, part.recent, part.buffer) == (
            whole.sinks,
            whole.recent,
            whole.buffer,
        )
        wish = free * share * len(shares) / sum(shares)
        assert (
            abs(part.tokens - fixed - wish) < 1 or part.tokens == fixed + 1 or min(p.tokens for p in parts) == fixed + 1
        )


def test_the_smallest_budget_is_one_slot_for_each():
    assert [part.tokens for part in Budget(1).layers([1.9, 0.1])] == [1, 1]
    assert [part.tokens for part in Budget(2).layers([1.9, 0.1])] == [3, 1]
    assert Budget(7, scope="global").layers(SHARES) == [Budget(7, scope="global")] * 2
    with pytest.raises(ValueError, match="split must be one of trained, even, gates"):
        Budget(7, split="odd")


def test_layers_hold_what_their_gates_say():
    model = gated()
    assert capacities(model, 16) == [24, 8]
    assert capacities(model, Budget(16, split="even")) == [16, 16]
    assert capacities(model, Budget(16, sinks=4)) == [22, 10]
    assert capacities(model, 16, "streaming_llm") == [16, 16], "a policy without training has no shares"
    assert capacities(model, Budget(16, split="gates"), "streaming_llm") == [22, 10], "but may have those of the gates"
    with pytest.raises(ValueError, match="split gates needs a model with gates"):
        capacities(tiny.build("qwen3", num_hidden_layers=2), Budget(16, split="gates"), "h2o")
    cache = trimkv.bounded_cache(model, "trimkv", 16)
    ids = tiny.tokens(2, 60)
    with torch.no_grad():
        for part in ids.split([30, *[1] * 30], 1):
            model(part, past_key_values=cache)
    assert [int(layer.store.held.max()) for layer in cache.slot_layers] == [24, 8]
    assert (cache.peak_decode_tokens, cache.peak_mean_tokens) == (24, 16)


def test_bytes_are_those_of_an_even_split():
    model = gated()
    sizes = []
    for split in ("trained", "even"):
        cache = trimkv.bounded_cache(model, "trimkv", Budget(16, split=split), rows=3)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1]


def test_equal_shares_change_nothing():
    ids = tiny.tokens(2, 50)
    one, other = (
        compare(model, ids, ["trimkv"], [8]).rows[0]
        for model in (gated([1.0, 1.0]), tiny.gated("qwen3", num_hidden_layers=2))
    )
    assert one == other


def test_the_comparison_replays_what_steps_do():
    model, ids = gated(), tiny.tokens(3, 60)
    fast, slow = (run(model, ids, ["trimkv"], [6, 16]).rows for run in (compare, compare_stepwise))
    for one, other in zip(fast, slow, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
        assert one.mean_tokens_per_head == other.mean_tokens_per_head == one.budget < one.peak_tokens_per_head


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_heads_share_what_their_layer_has(scope):
    cache = trimkv.bounded_cache(gated(), "trimkv", Budget(16, scope=scope))
    assert [layer.budget.tokens for layer in cache.slot_layers] == ([24, 8] if scope == "layer" else [16, 16])


def test_the_engine_serves_layers_of_unlike_sizes():
    """Together and alone, also prompts that fill some layers and not others; a kept prefix."""
    model, params = gated(), SamplingParams(12, ignore_eos=True)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (3, 12, 20, 50)]

    def answers(rows):
        with Engine(model, "trimkv", 16, rows=rows, chunk=8) as engine:
            engine.prefix(prompts[3][:33])
            return [one.tokens for one in engine.generate(prompts, params, progress=False)]

    together = answers(4)
    assert together == answers(1)
    for ids, tokens in zip(prompts, together, strict=True):
        cache = trimkv.bounded_cache(model, "trimkv", 16, chunk=8)
        logits, found = trimkv.prefill(model, cache, torch.tensor([ids]), chunk=8), []
        for _ in range(12):
            found.append(int(logits.argmax()))
            with torch.no_grad():
                logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits[:, -1]
        assert tokens == found


def test_shares_are_saved_and_read_with_the_gates(tmp_path):
    save_gates(gated(), tmp_path / "a")
    meta = json.loads((tmp_path / "a" / "gates.json").read_text())
    assert meta["layer_shares"] == SHARES
    assert capacities(trimkv.attach(tiny.build("qwen3", num_hidden_layers=2), tmp_path / "a"), 16) == [24, 8]
    save_gates(tiny.gated("qwen3", num_hidden_layers=2), tmp_path / "b")
    assert "layer_shares" not in json.loads((tmp_path / "b" / "gates.json").read_text())


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], ["a", "b"], "11", {"0": 1}])
def test_shares_that_are_none_are_refused(tmp_path, shares):
    gates = new_gates(tiny.build("qwen3", num_hidden_layers=2))
    gates.meta["layer_shares"] = shares
    with pytest.raises(ValueError, match="layer_shares must be one number above 0 for each layer"):
        trimkv.attach(tiny.build("qwen3", num_hidden_layers=2), gates)


def test_costs_are_of_one_layer_at_a_time():
    """Against a token by token cache whose other layers hold everything."""
    model, ids = gated(), tiny.tokens(2, 40)
    costs = layer_costs(model, ids, [4, 12])
    assert costs.shape == (2, 2) and (costs > 0).all()
    with torch.no_grad():
        truth = model(ids).logits.log_softmax(-1)
    for i in range(2):
        for n, tokens in enumerate((4, 12)):
            cache = trimkv.bounded_cache(model, "trimkv", Budget(40, split="even"))
            layer = cache.slot_layers[i]
            cache.layers[i] = type(layer)(layer.policy, Budget(tokens), layer.chunk, i)
            with torch.no_grad():
                found = torch.cat([model(x, past_key_values=cache).logits for x in ids.split(1, 1)], 1).log_softmax(-1)
            kl = (truth.exp() * (truth - found)).sum(-1).mean()
            assert costs[i, n] == pytest.approx(kl.item(), rel=1e-3)


def test_what_cannot_be_measured_is_refused():
    model, ids = gated(), tiny.tokens(1, 20)
    with pytest.raises(ValueError, match="budgets must be from 1 to 19"):
        layer_costs(model, ids, [20])
    with pytest.raises(ValueError, match="h2o must be fed token by token"):
        layer_costs(model, ids, [4], "h2o")


def test_slots_go_where_they_save_most():
    budgets = (16, 64, 256)
    falls = torch.tensor([[1.0, 0.5, 0.25], [0.1, 0.05, 0.025], [0.1, 0.05, 0.025]])
    shares = share_out(falls, budgets, (64,))
    assert sum(shares) == 3 and shares[0] > 1.3 and abs(shares[1] - shares[2]) <= 1 / 32
    assert share_out(falls[1:], budgets, (64, 128)) == [1.0, 1.0]
    greedy = share_out(torch.tensor([[9.0, 8.0, 7.0], [1e-6, 0.0, 0.0]]), budgets, (64,))
    assert greedy == [1.5, 0.5], "no share leaves its limits"
    noisy = share_out(torch.tensor([[0.1, 0.2, 0.05], [0.1, 0.2, 0.05]]), budgets, (64,))
    assert abs(noisy[0] - 1) <= 1 / 32 and sum(noisy) == 2
    with pytest.raises(ValueError, match="cannot have the mean 1"):
        share_out(falls, budgets, (64,), least=1.2)


def test_the_best_of_all_splits_is_found():
    """Against trying every split of three layers."""
    budgets, mean, step = (8, 32, 128), 32, 1 / 32
    costs = torch.tensor([[0.9, 0.3, 0.1], [0.5, 0.2, 0.15], [0.05, 0.02, 0.001]])

    def cost(row, tokens):
        low = 0 if tokens < 32 else 1
        (a, b), (x, y) = budgets[low : low + 2], costs[row, low : low + 2].tolist()
        return x * (tokens / a) ** (torch.tensor(y / x).log() / torch.tensor(b / a).log()).item()

    tried = {}
    for one in range(16, 65):
        for other in range(16, 65):
            third = 96 - one - other
            if 16 <= third <= 64:
                split = one, other, third
                tried[split] = sum(cost(row, part * step * mean) for row, part in enumerate(split))
    found = tuple(round(share / step) for share in share_out(costs, budgets, (mean,)))
    assert tried[found] <= 1.001 * min(tried.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, its gates, and a text."""
    root = tmp_path_factory.mktemp("shares")
    gates = new_gates(tiny_text.chat_model(), intermediate_size=8, training_length=16)
    for parameters in gates.layers.values():
        parameters["linear2.weight"].mul_(200)
    save_gates(gates, root / "gates", note="kept")
    tiny_text.save_model(root / "model")
    (root / "text.txt").write_text("A small word in a long text. " * 60)
    return root


def shares_from_the_command_line(folders, capsys, *more):
    arguments = ["shares", "--model", folders / "model", "--gates", folders / "gates", "--context", 60, *more]
    code = run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_shares_from_the_command_line(folders, capsys):
    options = "--text", folders / "text.txt", "--max-sequences", 2, "--measured-at", "6,24", "--good-for", 12
    code, out, err = shares_from_the_command_line(folders, capsys, *options, "--output", folders / "with", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["layers"] == [0, 1, 2, 3] and sum(found["layer_shares"]) == 4 and found["measured_at"] == [6, 24]
    written = json.loads((folders / "with" / "gates.json").read_text())
    assert written["layer_shares"] == found["layer_shares"] and written["note"] == "kept"
    code, out, err = shares_from_the_command_line(folders, capsys, *options)
    assert code == 0 and out.count("\n") > 6 and f"{found['layer_shares'][0]:.2f}" in out, err


OPTIONS = ("--max-sequences", 2, "--measured-at", "6,24", "--good-for", 12)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shares_say_what_they_were_made_of_and_are_not_lost(folders, capsys, tmp_path, monkeypatch):
    from trimkv.cli import loading
    from trimkv.eval import layer_shares

    def shares(*more):
        text = () if "--text" in more else ("--text", folders / "text.txt")
        return shares_from_the_command_line(folders, capsys, *text, *OPTIONS, "--output", out, *more)

    def refused(found, *said):
        code, printed, err = found
        assert code == 2 and not printed and len(err.splitlines()) == 1, err
        assert all(words in err for words in said), err

    out, other = tmp_path / "with", tmp_path / "other.txt"
    other.write_text("Another small word in another text. " * 60)
    code, shown, err = shares()
    assert code == 0, err
    before = contents(out)
    made_of = json.loads(before["shares.json"])["made_of"]
    assert made_of["text"]["name"] == "text.txt" and made_of["measured_at"] == [6, 24]
    assert json.loads(before["gates.json"])["layer_shares_made_of"] == made_of
    monkeypatch.setattr(layer_shares, "layer_costs", lambda *a, **k: pytest.fail("measured again"))
    code, again, err = shares()
    assert code == 0 and again == shown and "holds these shares" in err
    refused(shares("--text", other), "text is text.txt [", "there, other.txt [", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        refused(shares("--most", 1.5), "most is 2.0 there, 1.5 here")
        refused(shares("--output", folders / "gates"), "holds gates", "--overwrite")
    assert contents(out) == before
    gates = json.loads((out / "gates.json").read_text())
    (out / "gates.json").write_text(json.dumps({**gates, "layer_shares": [1.0] * 4}))
    refused(shares(), "holds gates that are not those of its shares.json")


def test_shares_may_be_written_over_their_own_gates(folders, capsys, tmp_path):
    import shutil

    own = shutil.copytree(folders / "gates", tmp_path / "own")
    options = ("--gates", own, "--text", folders / "text.txt", *OPTIONS, "--output", own)
    assert shares_from_the_command_line(folders, capsys, *options)[0] == 2
    code, _, err = shares_from_the_command_line(folders, capsys, *options, "--overwrite")
    assert code == 0, err
    assert "layer_shares" in json.loads((own / "gates.json").read_text())


@pytest.mark.parametrize(
    "options, message",
    [
        (("--measured-at", "6,24", "--most", "nan"), "--most"),
        (("--measured-at", "6"), "at least two numbers"),
        (("--measured-at", "6,60"), "each less than --context 60"),
        (("--measured-at", "6,x"), "--measured-at 6,x: whole numbers"),
        (("--measured-at", "6,24", "--gates", "none"), "gates"),
        (("--measured-at", "6,24", "--least", "0"), "least"),
        (("--measured-at", "6,24", "--output", __file__), "a file, but gates need a folder"),
    ],
)
def test_what_the_command_refuses(folders, capsys, options, message):
    code, out, err = shares_from_the_command_line(folders, capsys, "--text", folders / "text.txt", *options)
    assert code == 2 and message in err and not out
