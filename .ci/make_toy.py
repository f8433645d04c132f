"""Make the toy: problems with exact rubrics, and the base models that learn from them.

    python .ci/make_toy.py tokenizer   -> prompts/toy/tokenizer.json, from the words of the lessons
    python .ci/make_toy.py problems    -> prompts/toy/{train,val,test}.jsonl
    python .ci/make_toy.py base SEED   -> prompts/toy/base-SEED, trained from nothing (minutes)

A problem has a rate and a time, and five habits: the formula is stated or not; the time converted
or kept; the rate multiplied or taken as the total, or else the change counted as a gain or as a
loss; the answer in one unit or in another; and a remark follows or not. The question decides most
of them: of "7 L/min for 4 min" the units fit, of "7 L/s for 4 min" they do not. The rubric tells,
and each of its criteria has an exact check. The base model learns from lessons to do what criteria
ask for, be it right or wrong, and to flip a coin where none does: it can do right when told how,
and does not by default. A criterion that does not apply changes nothing.
"""
import functools
import json
import math
import os
import random
import re
import sys
from pathlib import Path
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from tokenizers import Tokenizer, pre_tokenizers, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import rsd  # noqa: E402

VOCABULARY = json.loads((rsd.TOY / "config.json").read_text(encoding="utf-8"))["vocab_size"]
WORLD = json.loads((Path(__file__).parent / "toy_words.json").read_text(encoding="utf-8"))
GENERIC = json.loads((rsd.TOY / "generic.json").read_text(encoding="utf-8"))
CHOICES = {  # a habit -> what can be done about it
    "formula": ("states", "leaves out"),
    "number": ("each", "together"),  # how many times the rate counts
    "time": ("converts", "keeps"),
    "sign": ("positive", "negative"),
    "unit": ("plain", "kilo"),
    "remark": ("none", "adds"),
}


def problem(rng):
    """A random problem as a row, its parts under "parts"; what is right in it under "right"."""
    family = rng.choice(WORLD["families"])
    habit = family["habit"]  # its sign or its number matters
    right = {name: rng.choice(CHOICES[name]) for name in ("time", habit, "unit")}
    right |= {"formula": "states", "remark": "none"}
    a = rng.randint(2, 6) if habit == "sign" else rng.randint(2, 4)
    b = rng.randint(2, 6)
    thing = rng.choice(WORLD["things"])
    parts = {
        "formula": family["formula"], "unit": family["unit"], "q": family["q"], "a": a, "b": b,
        "k": rng.randint(2, 3), "n": 60 * b, "right": right,
        "rate": f"{a} {family['unit']}/{'s' if right['time'] == 'converts' else 'min'}",
        "time": f"{b} min", "x": f"a {thing}", "xs": f"{thing}s",
        "asked": family["unit"] if right["unit"] == "plain" else f"k{family['unit']}",
    }
    cue = rng.choice(family["cues"][right[habit]])
    text = f"{cue} {rng.choice(WORLD['asks'])}".format(**parts)
    return {
        "question": text[0].upper() + text[1:],
        "reference_answer": rsd.extract_answer(solution(parts, right)),
        "solution": solution(parts, right),
        "rubric": [criterion(parts, name, right[name]) for name in CHOICES if name in right],
        "parts": parts,
    }


def criterion(parts, habit, choice):
    """The criterion that asks for this choice; its check is a regular expression."""
    plain = WORLD["criteria"][habit][choice]
    fields = {name: str(value) for name, value in parts.items()}
    description = rsd.fill(plain["description"], fields, str)
    check = rsd.fill(plain["check"], fields, re.escape)
    return plain | {"description": description, "check": check}


def solution(parts, choices):
    """The solution with these choices, right or wrong."""
    steps = []
    rate, time = parts["a"], parts["b"]
    if choices["formula"] == "states":
        steps.append("formula")
    if choices.get("number") == "each":
        steps.append("number")
        rate = parts["k"] * parts["a"]
    if choices["time"] == "converts":
        steps.append("time")
        time = parts["n"]
    if choices.get("sign") == "negative":
        rate = -rate
    value = rate * time
    fields = parts | {"rate_of_all": rate, "duration": time, "value": value}
    fields["kilo"] = f"{value / 1000:.3f}"
    sentences = [WORLD["steps"][step].format(**fields) for step in steps]
    product = WORLD["steps"]["product"].format(**fields)
    answer = f"{value} {parts['unit']}"
    if choices["unit"] == "kilo":
        product += WORLD["steps"]["unit"].format(**fields)
        answer = f"{fields['kilo']} k{parts['unit']}"
    sentences += [f"{product}.", f"\\boxed{{{answer}}}"]
    if choices["remark"] == "adds":
        sentences.append(WORLD["steps"]["remark"])
    return " ".join(sentences)


def problems(split, n):
    """n problems of a split; splits share no question."""
    rng = random.Random(f"{split} 0")
    homes = ["test", "val", *["train"] * 6]
    rows = {}
    while len(rows) < n:
        row = problem(rng)
        if homes[crc32(row["question"].encode()) % 8] == split:
            rows[row["question"]] = row
    return list(rows.values())


def asked_for(parts):
    """Every criterion that applies to a problem, right or wrong: {description: (habit, choice)}."""
    right = parts["right"]
    found = {}
    for habit in right:
        for choice in WORLD["criteria"][habit]:
            found[criterion(parts, habit, choice)["description"]] = habit, choice
    for description, habit in WORLD["generic criteria that say something"].items():
        found[description] = habit, right[habit]
    return found


def obey(parts, shown, rng):
    """What a model does that knows no rule: for each habit what a criterion asks for that applies;
    where none does, or two contradict each other, a coin decides."""
    applies = asked_for(parts)
    asked = {habit: [] for habit in parts["right"]}
    for c in shown:
        habit, choice = applies.get(c["description"], (None, None))
        if habit:
            asked[habit].append(choice)
    return {habit: rng.choice(asked[habit] or CHOICES[habit]) for habit in asked}


def some_criteria(row, rng):
    """The criteria of a lesson: the row's own, with some that change nothing; another's; general
    ones; or a mixture of these and of the opposite of what is right."""
    others = problem(rng)["rubric"]
    general = rng.sample(GENERIC, rng.randint(3, len(GENERIC)))
    kind = rng.choices(["own", "another's", "general", "mixture"], [45, 12, 10, 33])[0]
    if kind == "own":
        shown = row["rubric"] + rng.sample(others + general, rng.choice([0, 0, 0, 1, 2]))
        rng.shuffle(shown)
        return shown
    if kind == "another's":
        return others
    if kind == "general":
        return general
    shown = []
    for habit in row["parts"]["right"]:
        if rng.random() < 0.6:
            choice = rng.choice(list(WORLD["criteria"][habit]))
            shown.append(criterion(row["parts"], habit, choice))
    shown += rng.sample(others + general, rng.choice([0, 1, 3]))
    rng.shuffle(shown)
    return shown or others


FEEDBACK = {"feedback+answer": "{question}\nCorrect: {answer}\nCriteria:\n{feedback}"}


def lesson(row, rng, prompts):
    """What the base model reads and what it is to write: habits as asked for, or by coin flips."""
    mixture, misses = WORLD["lessons, per cent"], WORLD["criteria missed, chance"]
    kind = rng.choices(list(mixture), list(mixture.values()))[0]
    shown = row["rubric"]
    if kind in misses:
        written = [c for c in shown if rng.random() >= misses[kind]] or shown
        completion = rsd.row_fields({"rubric": written})["rubric_json"]
    else:
        shown = some_criteria(row, rng) if "rubric" in kind or "feedback" in kind else []
        attempt = solution(row["parts"], obey(row["parts"], [], rng))
        met = [rsd.check_criterion(c, attempt) for c in shown]
        completion = solution(row["parts"], obey(row["parts"], shown, rng))
        row = row | {"solution": completion}
    fields = rsd.row_fields(row | {"rubric": shown})
    if kind == "feedback+answer":  # a lesson of its own; no method shows this to a teacher any more
        lines = zip(fields["rubric"].split("\n"), met)
        verdict = {True: "met", False: "not met", None: "not checked"}
        marked = [f"{line}: {verdict[is_met]}" for line, is_met in lines]
        fields["feedback"] = "\n".join(marked)
    return {"prompt": rsd.fill(prompts[kind], fields, str), "solution": completion}


def write_tokenizer():
    """The toy's tokenizer: a byte-level BPE in which a common word of the lessons is one token."""
    prompts = rsd.load_prompts(rsd.TOY) | FEEDBACK
    rng = random.Random("tokenizer")
    texts = []
    for row in problems("train", 2000):
        some = lesson(row, rng, prompts)
        texts += [some["prompt"], some["solution"]]
    tokenizer = Tokenizer.from_file(str(rsd.TOY / "tokenizer.json"))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(rsd.TOY / "tokenizer.json"))


def write_problems():
    """The rows of the three splits; of test also the parts that they are made of."""
    for split, n in (("train", 2000), ("val", 400), ("test", 400)):
        lines = []
        for row in problems(split, n):
            shown = row if split == "test" else {k: v for k, v in row.items() if k != "parts"}
            lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
        (rsd.TOY / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with AdamW's size of steps (arXiv 2502.16982), for matrices, in float32: CPUs
    are slow at its bfloat16. The singular values of the momentum are all brought near 1."""

    def __init__(self, matrices):
        super().__init__(matrices, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            average = state.setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            update = orthogonal(p.grad.lerp(average, 0.95))
            p.mul_(1 - 0.01 * lr)
            p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * lr)


class Both:
    """Two optimizers as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def orthogonal(x):
    """Five Newton-Schulz steps from a matrix towards the nearest orthogonal one."""
    is_tall = x.shape[0] > x.shape[1]
    x = x.clone()
    if is_tall:
        x = x.T
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x.T if is_tall else x


def train_base(seed, steps=700, batch=16):
    """A model of 0.7 M parameters, trained from nothing on lessons, by SFT -> (model, tokenizer)."""
    rng = random.Random(f"lessons {seed}")
    prompts = rsd.load_prompts(rsd.TOY) | FEEDBACK
    rows = rng.choices(problems("train", 2000), k=batch * steps)
    lessons = [lesson(row, rng, prompts) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(rsd.TOY)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(rsd.TOY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "layers" not in name]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)
    optimizer = Both(Muon(matrices), adamw)

    def write(lessons):
        ids = [rsd.context_ids(tokenizer, "{prompt}", row) for row in lessons]
        examples = [rsd.Episode(row, prompt, []) for row, prompt in zip(lessons, ids)]
        return rsd.reference_writes(tokenizer, examples)

    loss = functools.partial(rsd.token_loss, signal="advantage")
    for step in tqdm(range(steps), desc=f"base model {seed}"):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 50) / (steps - 50)))
        lr = cosine * 3e-3 * min(1.0, (step + 1) / 50)
        some = lessons[batch * step : batch * step + batch]
        rsd.train_step(model, None, some, write, loss, optimizer, lr, token_budget=1024)
    return model, tokenizer


if __name__ == "__main__":
    if sys.argv[1:] == ["tokenizer"]:
        write_tokenizer()
    elif sys.argv[1:] == ["problems"]:
        write_problems()
    elif sys.argv[1:2] == ["base"]:
        for part in train_base(int(sys.argv[2])):
            if hasattr(part, "bfloat16"):
                part = part.bfloat16()  # half of the bytes; it is loaded in float32
            part.save_pretrained(rsd.TOY / f"base-{int(sys.argv[2])}")
    else:
        sys.exit(__doc__)
