"""`trimkv compare` over every policy: what is left out, what survives a kill, what is drawn."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

import trimkv
from tiny_text import chat_model, save_model
from trimkv.budget import Budget
from trimkv.cache.policies import POLICIES, make
from trimkv.cli.app import run
from trimkv.cli.compare import _pieces
from trimkv.eval import compare as measuring
from trimkv.gates.attach import new_gates
from trimkv.gates.head_sets import new_heads, save_heads
from trimkv.viz.compare import curves, draw, title

TRAINED = ("locret", "seer_attention_r", "trimkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2))


@pytest.fixture
def compare(capsys, folder, tmp_path):
    """Runs the command on the tiny model: (exit code, stdout, stderr)."""
    (tmp_path / "a.txt").write_text("A fox ran over the hill and a hen ran after it. " * 20)

    def call(*arguments, text=True):
        common = ("--model", folder, "--text", tmp_path / "a.txt", "--context", 40, "--max-sequences", 2)
        capsys.readouterr()
        code = run([str(argument) for argument in ("compare", *(common if text else ()), *arguments)])
        return code, *capsys.readouterr()

    return call


def mended(code, out, err, *said):
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("trimkv: error: "), err
    for fragment in said:
        assert fragment in err


class TestAll:
    def test_what_is_not_trained_is_left_out_and_said_once(self, compare, folder):
        code, out, err = compare("--policies", "all", "--budgets", 8, "--json")
        assert code == 0, err
        found = json.loads(out.splitlines()[-1])
        assert {one["policy"] for one in found["left_out"]} == set(TRAINED)
        assert all(folder in one["reason"] for one in found["left_out"])
        assert [row["policy"] for row in found["rows"]] == [name for name in POLICIES if name not in TRAINED]
        assert found["keep_all_tokens"] == ["full"] and found["seed"] == 0 and found["seconds"] > 0
        assert len(err.strip().splitlines()) == 1 and "trimkv train" in err and "--gates" in err
        assert all(name in err for name in TRAINED)

    def test_with_gates_and_heads_nothing_is_left_out(self, compare, tmp_path):
        model = chat_model(num_hidden_layers=2)
        trimkv.save_gates(new_gates(model, intermediate_size=8), tmp_path / "gates")
        save_heads(new_heads(model, "locret", width=8), tmp_path / "locret")
        save_heads(new_heads(model, "seer_attention_r", width=8, block_size=4), tmp_path / "seer")
        gates = ",".join(str(tmp_path / name) for name in ("gates", "locret", "seer"))
        code, out, err = compare("--policies", "all", "--budgets", 8, "--gates", gates, "--json")
        assert code == 0 and not err.strip(), err
        found = json.loads(out.splitlines()[-1])
        assert found["left_out"] == [] and [row["policy"] for row in found["rows"]] == list(POLICIES)
        assert found["keep_all_tokens"] == ["full", "seer_attention_r"]
        code, out, err = compare("--policies", "all", "--budgets", 8, "--gates", "none", "--json")
        reasons = {one["reason"] for one in json.loads(out.splitlines()[-1])["left_out"]}
        assert reasons == {"--gates none was given"}
        table = compare("--policies", "seer_attention_r", "--budgets", 8, "--gates", gates)[1]
        assert "all tokens are kept" in " ".join(table.split())

    def test_a_policy_that_does_not_suit_the_model_is_left_out_too(self, compare, monkeypatch):
        def refuse(self, modules):
            raise ValueError("this model is not for tova")

        monkeypatch.setattr(POLICIES["tova"], "fitted", refuse)
        code, out, err = compare("--policies", "all", "--budgets", 8, "--gates", "none", "--json")
        assert code == 0 and "tova (this model is not for tova)" in err
        assert {"policy": "tova", "reason": "this model is not for tova"} in json.loads(out.splitlines()[-1])[
            "left_out"
        ]
        mended(*compare("--policies", "tova", "--budgets", 8), "not for tova")

    def test_all_stands_alone(self, compare):
        mended(*compare("--policies", "all,random"), "--policies all")


class TestKilled:
    """Attention policies go token by token, and take hours: a kill costs one cell."""

    ARGUMENTS = ("--policies", "random,h2o,full,tova", "--budgets", "8,12", "--json", "--output")

    @pytest.fixture
    def killed(self, compare, tmp_path, monkeypatch):
        """A comparison that was killed in its fourth piece: rows of random and full, and h2o's first, are there."""
        pieces, measure = [], measuring.compare

        def watched(model, ids, policies, budgets, **options):
            pieces.append(([policy.name for policy in policies], [budget.tokens for budget in budgets]))
            if len(pieces) == 4:
                raise KeyboardInterrupt
            return measure(model, ids, policies, budgets, **options)

        monkeypatch.setattr(measuring, "compare", watched)
        code, out, _ = compare(*self.ARGUMENTS, tmp_path / "o.json")
        assert code == 130 and out == ""
        assert not (tmp_path / "o.json").exists() and (tmp_path / "o.json.part").exists()
        return pieces

    @pytest.mark.parametrize("together, sizes", [(1, [(1, 1)] * 6), (6, [(3, 2)]), (4, [(2, 2), (1, 2)])])
    def test_cells_fed_by_token_are_grouped_where_they_run_side_by_side(self, together, sizes):
        policies = [make(name) for name in ("h2o", "tova", "r_kv")]
        options = SimpleNamespace(output="x", stepwise=False)
        pieces = list(_pieces(policies, [Budget(8), Budget(12)], {}, together, options))
        assert [(len(some), len(at)) for some, at in pieces] == sizes
        cells = [(policy.name, budget.tokens) for some, at in pieces for policy in some for budget in at]
        assert sorted(cells) == sorted((policy.name, tokens) for policy in policies for tokens in (8, 12))

    def test_the_same_command_goes_on(self, compare, killed, tmp_path):
        code, out, err = compare(*self.ARGUMENTS, tmp_path / "o.json")
        assert code == 0 and "going on from" in err and "5 cells" in err, err
        one, two = [8], [12]
        assert killed[:3] == [(["random"], [8, 12]), (["full"], [8, 12]), (["h2o"], one)]
        assert killed[3:] == [(["h2o"], two)] * 2 + [(["tova"], one), (["tova"], two)]
        found = json.loads(out.splitlines()[-1])
        whole = json.loads(compare(*self.ARGUMENTS[:-1])[1].splitlines()[-1])
        assert [(row["policy"], row["budget"]) for row in found["rows"]] == [
            (row["policy"], row["budget"]) for row in whole["rows"]
        ]
        for ours, theirs in zip(found["rows"], whole["rows"], strict=True):
            assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3, abs=1e-6) and ours["tokens"] == theirs["tokens"]
        written = json.loads((tmp_path / "o.json").read_text())
        assert {name: written[name] for name in found} == found and written["command"]
        assert not list(tmp_path.glob("o.json.*"))

    @pytest.mark.parametrize(
        "changed, name",
        [
            (("--budgets", "8,16"), "budgets"),
            (("--context", 30), "context"),
            (("--policies", "random,h2o"), "policies"),
            (("--seed", 3), "seed"),
            (("--dtype", "bfloat16"), "dtype"),
            (("--stepwise",), "stepwise"),
        ],
    )
    def test_another_comparison_never_mixes_in_nor_destroys_it(
        self, compare, killed, tmp_path, changed, name, monkeypatch
    ):
        monkeypatch.setattr("trimkv.cli.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        before = (tmp_path / "o.json.part").read_bytes()
        mended(*compare(*self.ARGUMENTS, tmp_path / "o.json", *changed), "o.json.part", name, "another --output")
        assert (tmp_path / "o.json.part").read_bytes() == before

    def test_another_text_of_the_same_name(self, compare, killed, tmp_path):
        (tmp_path / "a.txt").write_text("Something else altogether. " * 40)
        mended(*compare(*self.ARGUMENTS, tmp_path / "o.json"), "text is a.txt [", "there, a.txt [")

    def test_a_damaged_one(self, compare, killed, tmp_path):
        (tmp_path / "o.json.part").write_text('{"settings": {')
        mended(*compare(*self.ARGUMENTS, tmp_path / "o.json"), "o.json.part", "delete it")

    def test_told_to_it_begins_anew(self, compare, killed, tmp_path, monkeypatch):
        changed = ("--budgets", "8", "--policies", "random", "--overwrite")
        code, _, err = compare(*self.ARGUMENTS, tmp_path / "o.json", *changed)
        assert code == 0 and "going on" not in err
        assert not list(tmp_path.glob("o.json.*"))

    def test_a_larger_batch_may_go_on(self, compare, killed, tmp_path):
        """Whoever ran out of memory goes on with a smaller one."""
        assert compare(*self.ARGUMENTS, tmp_path / "o.json", "--batch-size", 1)[0] == 0


class TestFinished:
    """A finished result is shown, never measured again nor lost without a word."""

    ARGUMENTS = ("--policies", "random,h2o", "--budgets", "8,12", "--output")

    @pytest.fixture
    def finished(self, compare, tmp_path, monkeypatch):
        code, shown, err = compare(*self.ARGUMENTS, tmp_path / "o.json")
        assert code == 0, err
        monkeypatch.setattr(measuring, "compare", lambda *a, **k: pytest.fail("measured again"))
        return shown

    def test_the_same_question_shows_it(self, compare, finished, tmp_path):
        before = (tmp_path / "o.json").read_bytes()
        code, shown, err = compare(*self.ARGUMENTS, tmp_path / "o.json")
        assert code == 0 and shown == finished
        assert "o.json holds this comparison, finished" in err and "--overwrite measures anew" in err
        code, out, _ = compare(*self.ARGUMENTS, tmp_path / "o.json", "--json")
        assert json.loads(out.splitlines()[-1]) == json.loads(before)
        assert (tmp_path / "o.json").read_bytes() == before

    @pytest.mark.parametrize(
        "changed, there, here",
        [
            (("--budgets", "8"), "budgets is 8, 12 there", "8 here"),
            (("--policies", "random"), "policies is random, h2o there", "random here"),
            (("--context", 30), "context is 40 there", "30 here"),
            (("--seed", 3), "seed is 0 there", "3 here"),
        ],
    )
    def test_another_question_is_refused_with_both_sides(
        self, compare, finished, tmp_path, changed, there, here, monkeypatch
    ):
        monkeypatch.setattr("trimkv.cli.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        before = (tmp_path / "o.json").read_bytes()
        found = compare(*self.ARGUMENTS, tmp_path / "o.json", *changed)
        mended(*found, "o.json holds another result", there, here, "--overwrite")
        assert (tmp_path / "o.json").read_bytes() == before

    def test_another_text(self, compare, finished, tmp_path):
        (tmp_path / "a.txt").write_text("Something else altogether. " * 40)
        mended(*compare(*self.ARGUMENTS, tmp_path / "o.json"), "text is a.txt [", "there, a.txt [")

    def test_told_to_it_measures_anew(self, compare, tmp_path):
        assert compare(*self.ARGUMENTS, tmp_path / "o.json")[0] == 0
        code, _, err = compare(*self.ARGUMENTS, tmp_path / "o.json", "--budgets", "16", "--overwrite")
        assert code == 0 and {row["budget"] for row in json.loads((tmp_path / "o.json").read_text())["rows"]} == {16}

    @pytest.mark.parametrize("content", ["mine", "{}", '{"rows": []}', "[1]"])
    def test_a_file_of_something_else(self, compare, tmp_path, content, monkeypatch):
        monkeypatch.setattr("trimkv.cli.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        (tmp_path / "o.json").write_text(content)
        mended(*compare(*self.ARGUMENTS, tmp_path / "o.json"), "o.json exists and does not say what it was made of")
        assert (tmp_path / "o.json").read_text() == content


def row(policy, budget, kl):
    return {"policy": policy, "budget": budget, "kl": kl, "perplexity": 2.0, "top1_agreement": 0.5, "tokens": 9} | {
        "peak_tokens_per_head": budget
    }


RESULT = {
    "rows": [
        row("full", 8, 0.0),
        row("random", 16, 0.2),
        row("random", 8, 0.5),
        row("trimkv", 8, 0.1),
        row("x", 8, 0.3),
    ],
    "full_perplexity": 12.345,
    "model": "some/model",
    "context": 2048,
    "sequences": 4,
    "keep_all_tokens": ["full", "x"],
}


class TestFigure:
    def test_lines(self):
        assert curves(RESULT) == {"random": [(8, 0.5), (16, 0.2)], "x": [(8, 0.3)], "trimkv": [(8, 0.1)]}
        assert list(curves(RESULT)) == ["random", "x", "trimkv"]  # as they lie on the page
        assert title(RESULT) == "model, 4 sequences of 2,048 tokens; perplexity with the full cache 12.35"

    def test_a_drawing_names_every_policy(self, tmp_path):
        pytest.importorskip("matplotlib")
        from matplotlib import rc_context

        with rc_context({"svg.fonttype": "none"}):
            draw(RESULT, tmp_path / "f.svg")
        text = (tmp_path / "f.svg").read_text()
        for said in ("random", "trimkv", "x (keeps all)", "12.35", "KL(full || policy), nats", ">16<"):
            assert said in text
        assert "full<" not in text

    def test_no_two_policies_look_alike(self):
        from trimkv.viz.compare import _look

        looks = [(_look(i)["color"], _look(i)["marker"]) for i in range(40)]
        assert len(set(looks)) == 40

    @pytest.mark.parametrize("kind", ["png", "svg"])
    def test_with_the_measurement_and_from_its_file(self, compare, tmp_path, kind, monkeypatch):
        pytest.importorskip("matplotlib")
        saved, figure, again = tmp_path / "o.json", tmp_path / f"f.{kind}", tmp_path / f"again.{kind}"
        arguments = ("--policies", "random,knorm", "--budgets", "8,12", "--output", saved, "--figure", figure)
        code, measured, err = compare(*arguments)
        assert code == 0 and figure.stat().st_size > 1000, err
        monkeypatch.setattr(measuring, "compare", lambda *a, **k: pytest.fail("measured again"))
        code, shown, err = compare("--from", saved, "--figure", again, text=False)
        assert code == 0 and again.stat().st_size > 1000 and shown == measured, err
        code, out, _ = compare("--from", saved, "--json", text=False)
        assert code == 0 and json.loads(out) == json.loads(saved.read_text())

    @pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
    def test_a_figure_is_not_drawn_over_another(self, compare, tmp_path, kind, monkeypatch):
        pytest.importorskip("matplotlib")
        figure, other = tmp_path / f"f.{kind}", tmp_path / "other.json"
        arguments = ("--policies", "random", "--output", tmp_path / "o.json", "--figure", figure)
        assert compare(*arguments, "--budgets", "8,12")[0] == 0
        drawn = figure.read_bytes()
        assert compare(*arguments, "--budgets", "8,12")[0] == 0, "the same figure again"
        assert compare("--from", tmp_path / "o.json", "--figure", figure, text=False)[0] == 0
        other.write_text(json.dumps(RESULT))
        before = figure.read_bytes()
        mended(*compare("--from", other, "--figure", figure, text=False), "shows another result", "--overwrite")
        monkeypatch.setattr(measuring, "compare", lambda *a, **k: pytest.fail("measured first"))
        again = ("--policies", "random", "--figure", figure, "--budgets", "8")
        mended(*compare(*again), "shows another result")
        assert figure.read_bytes() == before and len(drawn) > 1000
        assert compare("--from", other, "--figure", figure, "--overwrite", text=False)[0] == 0
        assert figure.read_bytes() != before
        figure.write_bytes(b"a photograph")
        monkeypatch.setattr("trimkv.cli.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        mended(*compare(*again), "is no figure of trimkv")
        assert figure.read_bytes() == b"a photograph"

    def test_what_can_be_mended(self, compare, tmp_path, monkeypatch):
        monkeypatch.setattr("trimkv.cli.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded first"))
        saved = tmp_path / "o.json"
        saved.write_text(json.dumps(RESULT))
        show = ("--from", saved)
        mended(*compare("--figure", tmp_path / "f.gif"), ".png, .svg, .pdf")
        mended(*compare("--figure", tmp_path / "no" / "f.png"), "cannot be written")
        mended(*compare(*show), "leave --text")
        mended(*compare("--from", tmp_path / "none.json", text=False), "none.json", "No such file")
        for broken in ("{", "[]", '{"rows": []}', json.dumps({**RESULT, "rows": [{"policy": "x"}]})):
            saved.write_text(broken)
            mended(*compare(*show, text=False), "o.json", "not a result")
        saved.write_text(json.dumps({**RESULT, "rows": RESULT["rows"][:1]}))
        if importlib.util.find_spec("matplotlib"):
            code, _, err = compare(*show, "--figure", tmp_path / "f.png", text=False)
            assert code == 2 and "nothing to draw" in err
        there = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else there(name))
        mended(*compare(*show, "--figure", tmp_path / "f.png", text=False), "-m pip install -e ", "[viz]")
        assert not list(tmp_path.glob("f.*"))
