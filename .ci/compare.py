"""Compare the methods, on the toy and on a real model; the README's tables of results are its.

    python .ci/compare.py toy               every system of SYSTEMS, 5 seeds (an hour on 2 cores)
    python .ci/compare.py toy rsd grpo      these rows alone
    python .ci/compare.py rates             three learning rates for each, on the validation split
    python .ci/compare.py price             rubric score against cost elsewhere, at temperature 1
    python .ci/compare.py model --model HuggingFaceTB/SmolLM2-135M-Instruct --data rar-science

A run is never done twice: --out holds what is done. Each run is a process of its own with one
thread; --jobs of them run at a time.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

import rsd  # noqa: E402

# ---- The systems of the toy: a row of the table -> flags of train -------------------------------
#
# 32 completions a step for everyone. "rubrics" may also be learned (a writer is trained first),
# zero-shot (the base model writes them), or one of ABLATIONS; "idea" is one of IDEAS.

GRPO = {"rollouts": 4, "batch": 8}
ABLATIONS = ("random", "generic", "noisy", "reduced")
SYSTEMS = {
    "base": None,
    "teacher": None,
    "sft": {"method": "sft"},
    "grpo": {"method": "grpo", **GRPO},
    "grpo-rubric": {"method": "grpo-rubric", **GRPO},
    "opsd": {"method": "opsd"},
    "the teacher writes, sft": {"method": "sft-teacher"},
    "the teacher writes, divergence": {"method": "rsd-teacher"},
    "references under the teacher": {"method": "rsd-reference"},
    "grpo and rsd": {"method": "rsd-grpo", **GRPO, "kl": 1.0},
    "rsd": {"method": "rsd"},
    "rsd, learned rubrics": {"rubrics": "learned"},
    "rsd, zero-shot rubrics": {"rubrics": "zero-shot"},
    "rsd, another question's rubric": {"rubrics": "random"},
    "rsd, generic rubric": {"rubrics": "generic"},
    "rsd, noisy rubrics": {"rubrics": "noisy"},
    "rsd, reduced rubrics": {"rubrics": "reduced"},
    "rsd, no answer in view": {"teacher_context": "rubric"},
    "rsd, reverse": {"divergence": "reverse"},
    "rsd, jsd": {"divergence": "jsd"},
    "rsd, sampled": {"divergence": "sampled"},
    "rsd, top-20": {"support": 20},
    "rsd, top-20 and tail": {"support": 20, "tail": True},
    "rsd, entry clip": {"clip": "entry"},
    "rsd, token clip": {"clip": "token"},
    "rsd, rubric dropout .2": {"idea": ("dropout", 0.2)},
    "rsd, rubric dropout .5": {"idea": ("dropout", 0.5)},
    "rsd, early tokens": {"idea": ("position", "early")},
    "rsd, late tokens": {"idea": ("position", "late")},
}
for strength in (0.25, 0.5, 1, 2):
    for control in ("bare question", "another's rubric", "generic rubric"):
        idea = ("contrast", strength, control)
        SYSTEMS[f"rsd, contrast {strength:g}, {control}"] = {"idea": idea}
RATES = (3e-4, 1e-3, 3e-3)
GRPO_RATES = (1e-4, 3e-4, 1e-3)
CHOSEN = {  # row -> the rate that `rates` found best, where it is not 1e-3
    "grpo": 3e-4,
    "grpo-rubric": 1e-4,
    "grpo and rsd": 3e-4,
    "rsd, sampled": 3e-4,
}


def run(kind, **flags):
    """Run the command of these settings, shown as one would type it -> its figures."""
    words = [kind.__name__.lower()]
    for name, value in flags.items():
        words.append(rsd.as_flag(name))
        if value is not True:
            words.append(str(value))
    return rsd.run(shlex.join(words))


# ---- The field's ideas: RSD with other functions in place of some of rsd.py's --------------------
#
# What beats RSD by two standard errors may become a choice there; what does not stays a row here.


def generic_rubric():
    """The rubric that is the same for every question of the toy."""
    return rsd.read_rubric((rsd.TOY / "generic.json").read_text(encoding="utf-8"))


def writer_that(change):
    """A training_writer that calls change(episodes, view) on what it wrote, before the teacher
    reads. view(episode, rubric): the teacher's context with this rubric in place of its own."""
    plain = rsd.training_writer

    def training_writer(args, writer):
        write = plain(args, writer)
        (template,) = rsd.prompt_files(args, args.teacher_context)

        def view(e, rubric):
            return writer.prompt(template, rsd.row_fields(e.row | {"rubric": rubric}))

        def write_and_change(examples):
            episodes = write(examples)
            change(episodes, view)
            return episodes

        return write_and_change

    return training_writer


def contrast(a, control):
    """The target is log-softmax(t + a (t - t_control)): t the teacher's logits, t_control its
    logits under the bare question, with the rubric of another row of the step, or with a generic
    rubric. The toy's head and SmolLM2's are linear, so that hidden states stand for logits."""
    plain, controls = rsd.rescore, {}

    def remember(episodes, view):
        for e, other in zip(episodes, episodes[1:] + episodes[:1]):
            ids = e.prompt_ids
            if control != "bare question":
                is_generic = control == "generic rubric"
                ids = view(e, generic_rubric() if is_generic else other.row["rubric"])
            controls[tuple(e.teacher_ids)] = ids

    def rescore(model, contexts, completions):
        hidden = plain(model, contexts, completions)
        without = [controls.get(tuple(ids)) for ids in contexts]
        if torch.is_grad_enabled() or None in without:  # the student's, or a model's first check
            return hidden
        return hidden + a * (hidden - plain(model, without, completions))

    return {"training_writer": writer_that(remember), "rescore": rescore}


def dropout(p):
    """A criterion of the teacher's rubric is left out with probability p, drawn anew for each
    completion; one always stays."""

    def drop(episodes, view):
        for e in episodes:
            rubric = e.row["rubric"]
            kept = [c for c in rubric if torch.rand(()) >= p]
            e.teacher_ids = view(e, kept or [rubric[torch.randint(len(rubric), ())]])

    return {"training_writer": writer_that(drop)}


def position(where):
    """A token's loss is weighted by its place in the completion: from 0 to 2 for late, from 2 to 0
    for early, 1 on average. The weight travels as the advantage, which a divergence does not use."""
    plain_flatten, plain_loss = rsd.flatten, rsd.token_loss

    def flatten(episodes, device):
        ids, _ = plain_flatten(episodes, device)
        weights = []
        for e in episodes:
            length = len(e.completion_ids)
            rising = (torch.arange(length, device=device) + 0.5) * 2 / length
            weights.append(rising if where == "late" else rising.flip(0))
        return ids, torch.cat(weights)

    def token_loss(student, teacher, ids, weight, **options):
        figures = plain_loss(student, teacher, ids, weight, **options)
        return figures | {"loss": weight * figures["loss"]}

    return {"flatten": flatten, "token_loss": token_loss}


IDEAS = {"contrast": contrast, "dropout": dropout, "position": position}


def train(idea=None, **flags):
    """Run train with these flags and, if there is one, this idea: (its name, its settings ...)."""
    changed = contextlib.nullcontext()
    if idea:
        name, *settings = idea
        changed = mock.patch.multiple(rsd, **IDEAS[name](*settings))
    with changed:
        return run(rsd.Train, **flags)


# ---- Other rubrics -------------------------------------------------------------------------------


def ablate(rubrics, source, generic=None, seed=0):
    """The rubrics of an ablation in place of each question's own: generic (the same for all),
    random (another question's), noisy (every second criterion is another's) or reduced (half of
    them)."""
    rng = random.Random(f"rubrics {seed}")
    n = len(rubrics)
    changed = []
    for i, own in enumerate(rubrics):
        other = rubrics[(i + rng.randrange(1, max(2, n))) % n]
        if source == "generic":
            own = generic
        elif source == "random":
            own = other
        elif source == "reduced":
            own = rng.sample(own, (len(own) + 1) // 2)
        else:
            own = [rng.choice(other) if other and k % 2 else c for k, c in enumerate(own, i)]
        changed.append(own)
    return changed


def write_ablation(file, source, seed, limit):
    """A file for --rubrics with the toy's training questions and the rubrics of an ablation."""
    rows = rsd.load_rows("toy", "train", limit, seed)
    changed = ablate([row["rubric"] for row in rows], source, generic_rubric(), seed)
    lines = []
    for row, rubric in zip(rows, changed):
        line = {"question": row["question"], "reference_answer": row["reference_answer"]}
        lines.append(json.dumps(line | {"rubric": rubric}) + "\n")
    Path(file).write_text("".join(lines), encoding="utf-8")


def toy_rubrics(args, source, seed, out):
    """The value of --rubrics for this source, made first if it has to be."""
    toy = {"data": "toy", "seed": seed, "limit": args.limit}
    file = f"{out}/rubrics.jsonl"
    if source in ABLATIONS:
        write_ablation(file, source, seed, args.limit)
        return file
    model = "toy"
    if source == "learned":
        model = f"{out}/writer"
        run(rsd.Train, stage="rubric", steps=20, out=model, resume=True, **toy)
    run(rsd.Generate, **{"model": model, "out": file} | toy)
    return file


def toy_folder(args, name, lr, seed):
    """Where a run of the toy is kept."""
    return Path(args.out) / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{lr:g}-{seed}"


def toy_system(args, name, seed, lr, split):
    """One row with one seed: train the toy's model with the row's flags, and test what comes out."""
    out = toy_folder(args, name, lr, seed)
    out.mkdir(parents=True, exist_ok=True)
    test = {"data": "toy", "seed": seed, "split": split, "limit": args.n, "max_new_tokens": 100}
    flags = SYSTEMS[name]
    if flags is None:
        writer = "rubric+answer" if name == "teacher" else "student"
        return run(rsd.Eval, writer=writer, **test)
    if flags.get("rubrics"):
        flags = flags | {"rubrics": toy_rubrics(args, flags["rubrics"], seed, out)}
    model = str(out / "model")
    trained = train(
        data="toy", seed=seed, limit=args.limit, steps=args.steps, lr=lr,
        max_new_tokens=100, out=model, resume=True, **flags,
    )
    return trained | run(rsd.Eval, model=model, **test)


# ---- The price of a criterion --------------------------------------------------------------------


def logits_and_ids(model, tokenizer, template, row, text):
    """The first 128 tokens of this text as the answer to a prompt file -> logits and ids."""
    prompt = rsd.context_ids(tokenizer, template, rsd.row_fields(row))
    chat = [{"role": "assistant", "content": text}]
    ids = rsd.chat_ids(tokenizer, chat, rsd.JUST_TEXT)[:128]
    logits = rsd.logits_of(model, rsd.rescore(model, [prompt], [ids]))
    return logits, torch.tensor(ids, device=model.device)


@torch.no_grad()
def toy_likelihoods(model_name, rows):
    """Mean log-probabilities, in nats a token: of the references under the bare question, and of
    the rows' rubrics under the prompt that asks for one, which nobody here trains."""
    loaded, prompts = rsd.load_model(model_name), rsd.load_prompts(rsd.TOY)
    found = {}
    for name, prompt, field in (
        ("references", "student", "solution"), ("rubrics", "writer+answer", "rubric_json"),
    ):
        of_rows = []
        for row in rows:
            text = rsd.row_fields(row)[field]
            of_rows.append(rsd.log_prob(*logits_and_ids(*loaded, prompts[prompt], row, text)))
        found[name] = torch.cat(of_rows).mean().item()
    return found


def toy_price(args, name, seed, lr, split):
    """One row with one seed and rate, tested after a quarter, a half and all of the steps at
    temperature 1 of all tokens: the rubric score, and the nats a token lost elsewhere."""
    out = toy_folder(args, name, lr, seed)
    test = {"data": "toy", "seed": seed, "split": split, "limit": args.n, "max_new_tokens": 100}
    test |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    rows = rsd.load_rows("toy", split, args.n, seed)
    before = toy_likelihoods(f"{rsd.TOY}/base-{seed % 2}", rows)
    figures, model = {}, str(out / "model")
    for steps in (args.steps // 4, args.steps // 2, args.steps):
        trained = train(
            data="toy", seed=seed, limit=args.limit, steps=steps, lr=lr, max_new_tokens=100,
            out=model, resume=True, **SYSTEMS[name],
        )
        after = toy_likelihoods(model, rows)
        lost = {f"{text}_lost": before[text] - after[text] for text in before}
        entropy = rsd.read_jsonl(out / "model" / "metrics.jsonl")[-1]["entropy"]
        tested = run(rsd.Eval, model=model, **test)
        figures[steps] = trained | tested | lost | {"entropy": entropy}
    return figures


# ---- A real model: criteria that every answer has to meet ---------------------------------------

BRIEF = REPO / "prompts" / "brief"
REAL_SYSTEMS = {
    "student before": None,
    "teacher": None,
    "rsd": {"method": "rsd"},
    "sft on the teacher's answers": {"method": "sft-teacher"},
    "grpo on the rubric score": {"method": "grpo-rubric", "rollouts": 4, "batch": 2},
    "rsd, contrast 0.25": {"idea": ("contrast", 0.25, "bare question")},
    "rsd, contrast 0.5": {"idea": ("contrast", 0.5, "bare question")},
    "rsd, contrast 1": {"idea": ("contrast", 1, "bare question")},
    "rsd, early tokens": {"idea": ("position", "early")},
}


def write_brief(args):
    """The short questions of --data with the criteria of prompts/brief, as two files: the last
    args.n questions test, the others train."""
    file = "by-question.json" if args.by_question else "rubric.json"
    rubric = json.loads((BRIEF / file).read_text(encoding="utf-8"))
    rows = {}
    for data in args.data:
        for row in rsd.load_rows(data, "train", 0):
            if len(row["question"]) < 300:
                rows[row["question"]] = row["reference_answer"]
    lines = []
    for question, answer in rows.items():
        own = rubric
        if args.by_question:  # the first criterion where the question has figures, else the second
            own = rubric[:1] if re.search(r"\d", question) else rubric[1:]
        row = {"question": question, "reference_answer": answer, "rubric": own}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    random.Random(0).shuffle(lines)
    assert len(lines) > 2 * args.n, f"--data has {len(lines)} short questions, and {args.n} test"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, some in (("test", lines[: args.n]), ("train", lines[args.n :])):
        (Path(args.out) / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")


@torch.no_grad()
def costs_elsewhere(model_name, rows, answers):
    """What training cost elsewhere, in nats a token under the bare question: the mean
    log-probability of the reference answers, and the model's entropy over its own answers."""
    loaded = rsd.load_model(model_name)
    template = rsd.load_prompts(BRIEF)["student"]
    of_references, of_answers = [], []
    for row in rows:
        reference, answer = row["reference_answer"], answers[row["question"]]
        of_references.append(rsd.log_prob(*logits_and_ids(*loaded, template, row, reference)))
        if answer:
            of_answers.append(rsd.entropy(logits_and_ids(*loaded, template, row, answer)[0]))
    return {
        "reference_log_prob": torch.cat(of_references).mean().item(),
        "entropy": torch.cat(of_answers).mean().item(),
    }


def real_system(args, name, seed, lr, split):
    """One row with one seed on a real model."""
    out = f"{args.out}/{name.replace(' ', '-')}-{lr:g}-{seed}-{args.temperature:g}"
    sampling = {"temperature": args.temperature, "top_p": 1.0, "top_k": 0, "max_new_tokens": 48}
    common = {"prompts": str(BRIEF), "seed": seed, **sampling}
    model, figures = args.model, {}
    if REAL_SYSTEMS[name]:
        model = f"{out}/model"
        flags = {"batch": 8, "warmup": 2, "lr": lr} | REAL_SYSTEMS[name]
        figures = train(
            model=args.model, data=f"{args.out}/train.jsonl", steps=args.steps,
            out=model, resume=True, **flags, **common,
        )
    writer = "rubric" if name == "teacher" else "student"
    answers = f"{out}/answers.jsonl"
    test = f"{args.out}/{split}.jsonl"
    tested = run(
        rsd.Eval, model=model, data=test, writer=writer, out=answers, batch_size=25, **common,
    )
    texts = {line["question"]: line["text"] for line in rsd.read_jsonl(Path(answers))}
    rows = rsd.load_rows(test, "")
    if name != "teacher":
        tested |= costs_elsewhere(model, rows, texts)
    return figures | tested


# ---- Running them, tables and a picture ----------------------------------------------------------


def one_run(job):
    """A row with one seed, in a process of its own; its figures are kept in --out."""
    args, name, seed, lr, split = job
    settings = [name, lr, seed, split, args.steps, args.n, args.limit, args.model]
    if args.what == "model":
        settings += [args.temperature, *["by question"] * args.by_question]
    words = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(map(str, settings)))
    kept = Path(args.out) / "figures" / f"{words}.json"
    if not kept.exists():
        begin = time.time()
        systems = {"model": real_system, "price": toy_price}
        figures = systems.get(args.what, toy_system)(args, name, seed, lr, split)
        figures |= {"wall": time.time() - begin}
        figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(figures))
    return name, seed, lr, json.loads(kept.read_text())


def run_all(args, jobs):
    """All jobs, --jobs at a time -> [(name, seed, learning rate, figures)]."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, maxtasksperchild=1) as pool:
        return list(pool.imap(one_run, jobs, chunksize=1))


def mean_table(done, columns):
    """Markdown: a line per row, mean +- standard error over its seeds."""
    rows = {}
    for name, _, _, figures in done:
        rows.setdefault(name, []).append(figures)
    lines = [f"| system | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in rows.items():
        cells = [name]
        for column in columns:
            mean, se, n = rsd.mean_se([run.get(column) for run in runs])
            if mean is None:
                cells.append("")
            elif abs(mean) >= 20:
                cells.append(f"{mean:.0f}")
            else:
                cells.append(f"{mean:.3f} +- {se:.3f}" if n > 1 else f"{mean:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN = {  # the rows in the picture, by colour; the student writes in all of them
    "rsd": "#005ab5",
    "opsd": "#dc3220",
    "grpo": "#1b7837",
    "grpo-rubric": "#8c510a",
}


def learning_curve(args, name):
    """[(tokens sampled so far, accuracy of a step's rollouts)], both means over the seeds; the
    accuracy is averaged over five steps."""
    runs = []
    for seed in range(args.seeds):
        lr = (args.lr or [CHOSEN.get(name, 1e-3)])[0]
        file = toy_folder(args, name, lr, seed) / "model" / "metrics.jsonl"
        runs.append(rsd.read_jsonl(file))
    points, sampled = [], 0.0
    for step in range(args.steps):
        sampled += sum(run[step]["trained"] for run in runs) / len(runs)
        window = [m["accuracy"] for run in runs for m in run[max(0, step - 4) : step + 1]]
        points.append((sampled, sum(window) / len(window)))
    return points


def draw(file, curves, place_x, ticks, label, dots=False):
    """Curves (name, colour, [(x, y from 0 to 1)]) as an SVG that needs no other file. place_x: x ->
    0 to 1; ticks: {x: its text}."""
    width, height, left, top = 640, 300, 50, 16

    def place(x, y):
        return left + (width - left - 130) * place_x(x), top + (height - 60) * (1 - y)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12" '
        'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    first, last = min(ticks), max(x for *_, points in curves for x, _ in points)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        (x, y), (end, _) = place(first, tick), place(max(last, max(ticks)), tick)
        parts.append(f'<line x1="{x}" x2="{end}" y1="{y}" y2="{y}" stroke="#dfe3e8"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick, text in ticks.items():
        x, y = place(tick, 0)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{text}</text>')
    x, y = left + (width - left - 130) / 2, place(first, 0)[1] + 36
    parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{label}</text>')
    ends = {}
    for name, colour, points in curves:
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        style = f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(f'<polyline points="{line}" {style}/>')
        for i, point in enumerate(points * dots):  # the larger, the later
            x, y = place(*point)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 + i}" fill="{colour}"/>')
        ends.setdefault(name, (points[-1], colour))
    heights = []
    for name, ((_, y), colour) in sorted(ends.items(), key=lambda end: -end[1][0][1]):
        _, y = place(last, y)
        x, _ = place(max(last, max(ticks)), 0)
        heights.append(max(y + 4, heights[-1] + 15 if heights else 0))  # labels do not overlap
        parts.append(f'<text x="{x + 8}" y="{heights[-1]:.0f}" fill="{colour}">{name}</text>')
    Path(file).write_text("\n".join([*parts, "</svg>\n"]))


def picture(args):
    """Rollout accuracy against sampled tokens."""
    curves = [(name, SHOWN[name], learning_curve(args, name)) for name in SHOWN if name in args.rows]
    most = max(points[-1][0] for *_, points in curves)
    ticks = {tick: f"{tick // 1000}k" for tick in range(0, int(most) + 1, 10_000)}
    draw(Path(args.out) / "curves.svg", curves, lambda x: x / most, ticks, "tokens sampled")


PRICED = {  # row of the toy or of a real model -> its name and colour in the picture
    "rsd": ("RSD", "#005ab5"),
    "the teacher writes, sft": ("SFT", "#dc3220"),
    "sft on the teacher's answers": ("SFT", "#dc3220"),
    "grpo-rubric": ("GRPO", "#1b7837"),
    "grpo on the rubric score": ("GRPO", "#1b7837"),
}


def price_picture(args, runs, label):
    """Score against nats lost elsewhere, on a logarithmic scale, means over the seeds. runs: [(row,
    line, number on the line, score, cost)]; the larger a dot, the higher the number."""
    lines = {}
    for name, line, number, *point in runs:
        lines.setdefault((name, line), {}).setdefault(number, []).append(point)
    curves = []
    for (name, _), points in lines.items():
        means = []
        for _, found in sorted(points.items()):
            score, cost = (sum(values) / len(values) for values in zip(*found))
            means.append((max(cost, 1e-3), score))
        curves.append((*PRICED[name], means))
    most = max(cost for *_, means in curves for cost, _ in means)
    ticks = {1e-3: "0.001 or less", 1e-2: "0.01", 0.1: "0.1", 1: "1"}
    ticks = {cost: text for cost, text in ticks.items() if cost < max(0.1, 3 * most)}

    def place_x(cost):
        return math.log10(cost / 1e-3) / math.log10(max(most, max(ticks)) / 1e-3)

    draw(Path(args.out) / "price.svg", curves, place_x, ticks, label, dots=True)


def rates(args):
    """Three learning rates for every row, tested on the validation split with one seed."""
    trained = [name for name in args.rows if SYSTEMS[name]]
    jobs = []
    for name in trained:
        tried = GRPO_RATES if SYSTEMS[name].get("rollouts") else RATES
        jobs += [(args, name, 0, lr, "val") for lr in tried]
    done = run_all(args, jobs)
    text = ""
    for name in trained:
        found = {lr: f for row, _, lr, f in done if row == name}
        shown = "  ".join(
            f"{lr:g}: {f['accuracy']:.3f} {f['rubric_score']:.3f}" for lr, f in found.items()
        )
        best = max(found, key=lambda lr: found[lr]["accuracy"])
        text += f"{name:36s} {shown}  best {best:g}\n"
    (Path(args.out) / "rates.txt").write_text(text)
    print(text)


def toy(args):
    """The table of the toy and its picture."""
    jobs = []
    for seed in range(args.seeds):
        for name in args.rows:
            jobs += [(args, name, seed, lr, "test") for lr in args.lr or [CHOSEN.get(name, 1e-3)]]
    done = run_all(args, jobs)
    columns = ("accuracy", "rubric_score", "trained", "seconds")
    text = mean_table(done, columns)
    text += f"\n\n{args.seeds} seeds, {args.steps} steps, n {args.n}, limit {args.limit}\n"
    (Path(args.out) / "table.md").write_text(text)
    if SHOWN.keys() & set(args.rows):
        picture(args)
    print(text)


def price(args):
    """Score against cost elsewhere for RSD, SFT on the teacher's texts and GRPO: three learning
    rates and three numbers of steps for each."""
    jobs = []
    for seed in range(args.seeds):
        for name in [row for row in PRICED if row in SYSTEMS]:
            tried = GRPO_RATES if SYSTEMS[name].get("rollouts") else RATES
            jobs += [(args, name, seed, lr, "test") for lr in tried]
    rows, points = [], []
    for name, seed, lr, figures in sorted(run_all(args, jobs), key=lambda run: (run[0], run[2])):
        for steps in figures.keys() - {"wall", "peak_mb"}:
            rows.append((f"{name}, lr {lr:g}, {steps} steps", seed, lr, figures[steps]))
            found = figures[steps]
            points.append((name, lr, int(steps), found["rubric_score"], found["rubrics_lost"]))
    rows.sort(key=lambda row: row[0])
    columns = ("rubric_score", "accuracy", "references_lost", "rubrics_lost", "entropy", "trained")
    text = mean_table(rows, columns)
    text += f"\n\n{args.seeds} seeds, temperature 1, n {args.n}, limit {args.limit}\n"
    (Path(args.out) / "table.md").write_text(text)
    price_picture(args, points, "nats a token lost on rubric texts, which nobody trains")
    print(text)


def model(args):
    """The table of a real model; with several rates, their picture as well."""
    write_brief(args)
    jobs = []
    for seed in range(args.seeds):
        for name in args.rows:
            jobs += [(args, name, seed, lr, "test") for lr in args.lr]
    trained_first = [job for job in jobs if job[2] == 0 or REAL_SYSTEMS[job[1]]]
    jobs = trained_first + [job for job in jobs if job not in trained_first]
    done = run_all(args, jobs)
    if len(args.lr) > 1:
        ((*_, untrained),) = run_all(args, [(args, "student before", 0, args.lr[0], "test")])
        points = []
        for name, _, lr, figures in done:
            if name in PRICED:
                lost = untrained["reference_log_prob"] - figures["reference_log_prob"]
                points.append((name, name, lr, figures["rubric_score"], lost))
        if points:
            price_picture(args, points, "nats a token lost on the references")
        done = [(f"{name}, lr {lr:g}", seed, lr, f) for name, seed, lr, f in done]
    columns = ["rubric_score", "tokens", "truncated", "entropy", "reference_log_prob"]
    columns += ["trained", "seconds", "peak_mb"]
    text = mean_table(done, columns)
    text += f"\n\n{args.model}, {args.seeds} seeds, {args.steps} steps of 8, lr {args.lr}, n {args.n}\n"
    (Path(args.out) / "table.md").write_text(text)
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["toy", "rates", "price", "model"])
    parser.add_argument("rows", nargs="*", help="rows of the table (default: all)")
    parser.add_argument("--seeds", type=int, help="default: 5 on the toy, 3 for price and model")
    parser.add_argument("--steps", type=int, help="default: 40 on the toy, 12 on a model")
    parser.add_argument("--n", type=int, help="held-out questions (default: 200 and 100)")
    parser.add_argument("--limit", type=int, default=256, help="training problems of the toy")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", nargs="+", default=["rar-science"])
    parser.add_argument("--lr", type=float, nargs="+", help="default: CHOSEN's on the toy, else 3e-5")
    parser.add_argument("--temperature", type=float, default=0.7, help="of all sampling, on a model")
    parser.add_argument("--by-question", action="store_true", help="a criterion for each question")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", help="default: runs/compare-WHAT")
    args = parser.parse_args()
    is_toy = args.what in ("toy", "rates", "price")
    args.seeds = args.seeds or (5 if is_toy and args.what != "price" else 3)
    args.steps = args.steps or (40 if is_toy else 12)
    args.n = args.n or (200 if is_toy else 100)
    args.lr = args.lr or ([] if is_toy else [3e-5])
    args.out = args.out or f"runs/compare-{args.what}"
    known = REAL_SYSTEMS if args.what == "model" else SYSTEMS
    unknown = set(args.rows) - known.keys()
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}; there are {', '.join(known)}")
    args.rows = args.rows or list(known)
    whats = {"toy": toy, "rates": rates, "price": price, "model": model}
    whats[args.what](args)


if __name__ == "__main__":
    main()
