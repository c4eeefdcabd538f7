"""What both codes generate: one entry is one model, its gates, a budget and a prompt."""

from dataclasses import dataclass

from peers.authors.exact_random import integers

# Where the authors' code is from. The package has one strategy and gates of kind rg; the repository, as it was when the
# paper appeared, has two strategies and three kinds (its Llama and Phi-3 know two).
PACKAGE, REPOSITORY = "0.1.5", "0456bc4"
GATES = {"qwen3": ("rg", "rg2", "rg3"), "llama": ("rg", "rg2"), "phi3": ("rg", "rg2")}
BUDGETS = ((16, 4), (8, 1), (24, 16))
PROMPTS = (6, 60)  # shorter than every memory, and longer
NEW = 32


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        code: PACKAGE or REPOSITORY.
        recent: newest tokens that are never evicted.
        turns: how often the conversation goes on, with ``prompt`` more tokens and ``NEW`` generated ones.
    """

    code: str
    model: str
    gate: str
    strategy: str
    memory: int
    buffer: int
    prompt: int
    recent: int = 0
    turns: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [
            self.code,
            self.model,
            self.gate,
            self.strategy,
            f"{self.memory}+{self.buffer}",
            f"prompt{self.prompt}",
        ]
        parts += [f"recent{self.recent}"] if self.recent else []
        return " ".join([*parts, *([f"turns{self.turns}"] if self.turns > 1 else [])])

    def tokens(self, turn: int) -> list[list[int]]:
        """The turn's new tokens, one row."""
        return integers(3, 128, 1, self.prompt, seed=(self.seed, 1000 + turn)).tolist()


def all_cases() -> list[Case]:
    cases = []
    for memory, buffer in BUDGETS:
        for prompt in PROMPTS:
            for model, gates in GATES.items():
                for gate in gates:
                    for strategy in ("alpha", "knorm_alpha"):
                        cases.append(Case(REPOSITORY, model, gate, strategy, memory, buffer, prompt))
            for model in (*GATES, "qwen2"):
                cases.append(Case(PACKAGE, model, "rg", "alpha", memory, buffer, prompt))
    for model in (*GATES, "qwen2"):
        cases.append(Case(PACKAGE, model, "rg", "alpha", 16, 4, 30, recent=6))
        cases.append(Case(PACKAGE, model, "rg", "alpha", 16, 4, 20, turns=3))
    return cases
