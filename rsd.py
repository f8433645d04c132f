# SPDX-License-Identifier: MIT
"""Rubric-Conditioned Self-Distillation (RSD): the whole method in one file.

RSD teaches a model from rubrics, lists of weighted criteria that a good answer meets. One network
plays two parts, and one step of training is this:

  1. The student reads the bare question x and samples a completion y ~ p_S(. | x).
  2. The teacher, the same network with the rubric r in its context, re-scores every token of y.
     Its weights are by default a frozen copy of those that the student began with.
  3. The student re-scores y as well, from the question alone.
  4. At every position t of y the two next-token distributions are compared:
         loss = 1/N * sum over t of D( p_T(. | x, r, y_<t) || p_S(. | x, y_<t) )
     The gradient flows through the student only; this N counts the tokens of the whole step.
  5. The optimizer takes one step. After training the student needs no rubric.

`train_step`, in section 4, is these five steps as code, and `train` after it the loop. Stop there
and you know RSD; it takes about half an hour. Section 5 adds the rubrics, 6 the grades, the others
a trainer; `training_writer`, in section 11, gives the other methods their rewards.

  python rsd.py demo                                   the whole method on a toy, on a laptop CPU
  python rsd.py generate --model Qwen2.5-7B-Instruct   write a rubric for every question
  python rsd.py train    --model Qwen2.5-1.5B          train against the rubric-guided teacher
  python rsd.py eval     --model runs/train            answer held-out questions and grade them
  python rsd.py inspect  --model Qwen2.5-1.5B          see which tokens the rubric moves

  paper (arXiv 2606.19327)      code                  shapes
  x, y*, z                      question,             B sequences, T tokens of one of them,
                                reference_answer,     N completion tokens of all of them,
                                solution              V vocabulary, H width of the hidden states,
  r = {c_1 .. c_K}              rubric                K criteria
  y                             completion            ids: lists of token ids
  p_S, p_T                      student, teacher
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import difflib
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import statistics
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, NamedTuple
from zlib import crc32

import regex
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.utils import get_session
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend: the command line prints one sentence and exits with 2."""


def require(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def user_error(about):
    """In place of any error of the block, and there are many kinds, UserError: about, and why."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{about}: {' '.join(str(error).split()):.500}") from error


def say(*words):
    """Print a line, above a progress bar if there is one."""
    tqdm.write(" ".join(map(str, words)))


class Stopwatch:
    """Wall seconds by name; `lap` waits for a GPU's work first."""

    def __init__(self):
        self.seconds = Counter()
        self.last = time.perf_counter()

    def lap(self, name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now


# ---- 1. Two contexts: what the student sees, what the teacher sees ------------------------------


@dataclass
class Episode:
    """One row on its way from sampling to the update.

    It holds token ids, never text: a completion that is decoded and encoded again may come back as
    other tokens, and the loss would then be of something that nobody sampled.
    """

    row: dict
    prompt_ids: list[int]  # what the student sees: the question
    teacher_ids: list[int]  # what the teacher sees in its place: the question and the rubric
    completion_ids: list[int] = ()  # its first stop token included
    stopped: bool = False  # False: cut off at the limit of tokens
    advantage: float = 1.0  # weight of the policy gradient: 1 in SFT, (r - mean) / std in GRPO
    scores: dict = field(default_factory=dict)  # how the completion was graded


PLACEHOLDER = re.compile(r"\{(\w+)\}")


def fill(template, fields, protect=str):
    """A prompt file with a row's fields in the places of its {placeholders}. Braces, backslashes
    and $ in the data stay as they are; `protect` is applied to each field. KeyError: a field is
    missing."""
    return PLACEHOLDER.sub(lambda match: protect(fields[match[1]]), template)


# In front of every chat template, where it hides transformers' strftime_now, so that prompts do not
# change with the day.
FIXED_DAY = "{% macro strftime_now(format) %}01 Jan 2026{% endmacro %}"


def control_tokens(tokenizer):
    """{name: id} of the tokens that no data may write. Runs of blanks are none."""
    added = tokenizer.get_added_vocab().items()
    return {name: i for name, i in added if name.strip("▁ \t\r\n")}


def chat_ids(tokenizer, chat, template=None, **options):
    """The ids of a chat, as the model's template (or another one) writes it.

    A question may contain "<|im_end|>", by chance or by malice, and must not end the user's turn
    with it: in the messages, control tokens are encoded as text. UserError: the tokenizer cannot
    do that, or the template fails.
    """
    control = control_tokens(tokenizer)
    tokenizer.chat_control_tokens = list(control)
    # The same chat with a harmless text has to have the same control tokens.
    harmless = [message | {"content": "x"} for message in chat]
    with user_error(f"the chat template fails on the chat {chat!r:.200}"):
        both = tokenizer.apply_chat_template(
            [chat, harmless], chat_template=FIXED_DAY + (template or tokenizer.get_chat_template()),
            sanitize_control_tokens=True, return_dict=False, **options,
        )
    known = set(control.values())
    written, expected = ([i for i in ids if i in known] for ids in both)
    require(written == expected, f"the tokenizer makes a control token of text in {chat!r:.200}.")
    return both[0]


def context_ids(tokenizer, template, fields, thinking=False):
    """One prompt file and one row's fields -> the ids [P] of a chat prompt.

    This is the only builder of prompts, for training and for evaluation, for student and teacher.
    """
    chat = [{"role": "user", "content": fill(template, fields)}]
    switches = dict.fromkeys(("enable_thinking", "thinking", "reasoning"), thinking)
    return chat_ids(tokenizer, chat, add_generation_prompt=True, **switches)


# ---- 2. Sampling: prompt ids in, completion ids out ---------------------------------------------


@torch.no_grad()
def sample_completions(
    model, prompts, stop, max_new_tokens=512, batch_size=64,
    temperature=1.0, top_p=1.0, top_k=0, multiple=1, **options,
):
    """B prompts of ids -> B pairs (completion ids [T_b], stopped), in the order of the prompts.

    A completion ends with its first stop token, which is part of it; without one it has
    max_new_tokens ids and stopped is False. temperature 0 is greedy, top_p 1 and top_k 0 are all
    tokens. The model's own defaults, such as a repetition penalty, are set aside; options are those
    of transformers' GenerationConfig. Prompts are padded to a multiple of `multiple` tokens, for a
    compiled model, which meets fewer sizes then.
    """
    config = GenerationConfig(
        eos_token_id=sorted(stop), pad_token_id=min(stop), max_new_tokens=max_new_tokens, **options
    )
    if temperature > 1e-6:
        config.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    sampler = copy.copy(model.eval())  # the same weights, without the model's own defaults
    sampler.generation_config = GenerationConfig()
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    completions = {}
    for start in range(0, len(prompts), batch_size):
        rows = longest_first[start : start + batch_size]
        width = len(prompts[rows[0]])
        width += -width % multiple
        padding = [width - len(prompts[i]) for i in rows]  # on the left
        ids = [[0] * n + prompts[i] for n, i in zip(padding, rows)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        out = sampler.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
        for i, new in zip(rows, out[:, width:].tolist()):
            end = next((k + 1 for k, token in enumerate(new) if token in stop), None)
            completions[i] = new[:end], end is not None
    return [completions[i] for i in range(len(prompts))]


# ---- 3. Re-scoring and the per-token loss --------------------------------------------------------


def rescore(model, contexts, completions):
    """The hidden states [N, H] that predict each completion token (the context's last one predicts
    the first), one sequence after the other; here and below N counts one micro-batch. Padding is on
    the right, where a causal model never looks, so that no mask is needed."""
    ids = [  # without the last token, which predicts none
        torch.tensor(p + c[:-1], device=model.device) for p, c in zip(contexts, completions)
    ]
    for layer in model.modules():  # checkpointing works in training mode only; dropout stays off
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = torch.is_grad_enabled()
    ids = pad_sequence(ids, batch_first=True)
    body = getattr(model, "model", model.base_model)  # Llama 4 names another as its base
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, H)
    parts = [h[len(p) - 1 :][: len(c)] for h, p, c in zip(hidden, contexts, completions)]
    return torch.cat(parts)


def setting_of(model, *names):
    """The first of these settings that the model's configuration for text has; else None."""
    config = model.config.get_text_config()
    values = (getattr(config, name, None) for name in names)
    return next(filter(None, values), None)


def logits_of(model, hidden):
    """The model's output head on hidden states: [N, H] -> [N, V], with the scale of Cohere, Granite
    or Falcon-H1 and the soft cap of Gemma."""
    head = model.get_output_embeddings()
    scale = setting_of(model, "logit_scale", "lm_head_multiplier") or 1
    scale = scale / (setting_of(model, "logits_scaling") or 1)
    logits = head(scale * hidden.to(head.weight.dtype))  # scaled heads have no bias
    cap = setting_of(model, "final_logit_softcapping", "logits_soft_cap")
    return cap * torch.tanh(logits / cap) if cap else logits


def log_prob(logits, ids):
    """The log-probability [N] of the tokens ids [N] under logits [N, V]."""
    return -F.cross_entropy(logits.float(), ids, reduction="none")


@torch.no_grad()
def entropy(logits):
    """The entropy [N] in nats of logits [N, V]."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def on_tokens(logp, index, tail):
    """Log-probs [N, V] on the tokens index [N, k] alone: renormalised [N, k], or with one bucket
    more for the rest of the mass [N, k + 1]."""
    kept = logp.gather(-1, index)
    if not tail:
        return kept.log_softmax(-1)
    rest = logp.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1)


def divergence(
    student, teacher, beta=0.0, top_k=0, tail=False, temperature=1.0, clip="none", clip_at=0.05
):
    """D(T, S) per token: logits or log-probs [N, V] of student and teacher -> [N], in float32.

    beta 0: the forward KL(T || S), the paper's choice; 1: the reverse KL(S || T); between them beta
    KL(T || m) + (1 - beta) KL(S || m), m = beta T + (1 - beta) S. top_k > 0: on the teacher's top_k
    tokens, renormalised; with tail, one more bucket has the rest. temperature divides both logits.
    clip "token" caps the sum, "entry" every entry, as the paper's code does, which can invert it.

    >>> p, q = torch.tensor([[.9, .1]]).log(), torch.tensor([[.1, .9]]).log()
    >>> [round(divergence(q, p, clip=c).item(), 2) for c in ("none", "entry", "token")]
    [1.76, -0.17, 0.05]
    """
    s, t = ((x.float() / temperature).log_softmax(-1).clamp(min=-1e30) for x in (student, teacher))
    if 0 < top_k < s.shape[-1]:
        index = t.topk(top_k, dim=-1).indices
        s, t = on_tokens(s, index, tail), on_tokens(t, index, tail)

    def kl(p, q):  # the V entries of KL(p || q), from log-probs
        terms = F.kl_div(q, p, log_target=True, reduction="none")  # p log(p / q)
        if clip == "entry":
            return terms
        return terms - p.exp() + q.exp()  # adds 0, and the gradient is exactly 0 where p = q

    if beta == 0:
        terms = kl(t, s)
    elif beta == 1:
        terms = kl(s, t)
    else:
        m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
        m = torch.where(s == t, t.lerp(s, 1 - beta), m)  # equal ones without rounding
        terms = beta * kl(t, m) + (1 - beta) * kl(s, m)
    if clip == "entry":
        terms = terms.clamp(max=clip_at)
    total = terms.sum(-1)
    return total.clamp(max=clip_at) if clip == "token" else total


BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # the divergences by name


def token_loss(student, teacher, ids, advantage, signal="forward", kl=0.0, **options):
    """The per-token signal, choice 3 of a `Method`, and what is logged of it.

    Logits [N, V] of student and teacher; ids and advantage [N] -> loss and entropy, each [N].
    forward, reverse and jsd are `divergence` with these options. The other two are policy gradients
    and ignore all options but kl, the weight of the reverse KL to the teacher. sampled: with the
    advantage log p_T - log p_S. advantage: with the given one; 1 makes it SFT's cross-entropy.
    KeyError: an unknown signal.
    """
    if signal in ("advantage", "sampled"):
        logp = log_prob(student, ids)
        if signal == "sampled":
            advantage = (log_prob(teacher, ids) - logp).detach()
        loss = -advantage * logp
        if kl:
            loss += kl * divergence(student, teacher, beta=1.0)
    else:
        loss = divergence(student, teacher, BETAS[signal], **options)
    return {"loss": loss, "entropy": entropy(student)}


def backward_in_chunks(
    loss, student, hidden, teacher, teacher_hidden, per_token, denominator, chunk=24_000_000
):
    """Backward of sum(loss) / denominator; no more than `chunk` logits exist at a time.

    hidden [N, H] with its graph, teacher_hidden [N, H] or None. loss(student logits [n, V],
    teacher logits [n, V] or None, each of per_token [n]) -> {"loss": [n], any other figure: [n]}.
    Returns the sum of every figure over the N tokens. If memory were no matter, this would do:

        figures = loss(logits_of(student, hidden), logits_of(teacher, teacher_hidden), *per_token)
        (figures["loss"].sum() / denominator).backward()
        return {name: values.sum() for name, values in figures.items()}
    """
    rows = max(1, chunk // len(student.get_output_embeddings().weight))
    gradient = torch.zeros_like(hidden)
    sums = Counter()
    for start in range(0, max(1, len(hidden)), rows):  # of no tokens, one empty chunk
        some = slice(start, start + rows)
        h = hidden[some].detach().requires_grad_()
        target = None
        if teacher_hidden is not None:
            target = logits_of(teacher, teacher_hidden[some]).detach()
        figures = loss(logits_of(student, h), target, *(x[some] for x in per_token))
        (figures["loss"].sum() / denominator).backward()  # into the head, and down to h
        gradient[some] = h.grad
        for name, values in figures.items():
            sums[name] += values.sum().item()
    if hidden.requires_grad:  # it does not if the head alone is trained
        hidden.backward(gradient)  # through the rest of the model
    return sums


# ---- 4. One step, and the loop: methods as choices in one pipeline -------------------------------


class Method(NamedTuple):
    """Three choices, and the reward of those that take one."""

    writer: str  # 1. who writes the completion: student, teacher or reference
    sees: str | None  # 2. what the teacher has in view; None: no more than the student
    signal: str  # 3. the per-token signal; "divergence": forward, reverse, jsd or sampled
    reward: str | None = None  # which score becomes the advantage


METHODS = {
    "rsd": Method("student", "rubric", "divergence"),
    "opsd": Method("student", "solution", "divergence"),
    "grpo": Method("student", None, "advantage", "accuracy"),
    "grpo-rubric": Method("student", None, "advantage", "rubric_score"),
    "sft": Method("reference", None, "advantage"),
    "sft-teacher": Method("teacher", "rubric", "advantage"),  # of the teacher's own completions
    "rsd-teacher": Method("teacher", "rubric", "divergence"),
    "rsd-reference": Method("reference", "rubric", "divergence"),
    "rsd-grpo": Method("student", "rubric", "advantage", "rubric_score"),  # the teacher by --kl
}


def model_writes(sample, examples, rollouts=1, context="prompt_ids"):
    """Choice 1, who writes: the student, or the teacher from its own context "teacher_ids".
    `sample` (prompts of ids -> pairs of ids and stopped) writes `rollouts` times per example."""
    examples = [e for e in examples for _ in range(rollouts)]
    written = zip(examples, sample([getattr(e, context) for e in examples]))
    return [replace(e, completion_ids=ids, stopped=stopped) for e, (ids, stopped) in written]


def micro_batches(episodes, token_budget):
    """Episodes, widest first, cut so that rows x width stay within the budget."""

    def width(e):
        return max(len(e.prompt_ids), len(e.teacher_ids)) + len(e.completion_ids)

    remaining = sorted(episodes, key=width, reverse=True)
    while remaining:
        rows = max(1, token_budget // width(remaining[0]))
        yield remaining[:rows]
        del remaining[:rows]


def flatten(episodes, device):
    """The N trained tokens -> their ids and their advantage, both [N]."""
    ids = [i for e in episodes for i in e.completion_ids]
    advantage = [e.advantage for e in episodes for _ in e.completion_ids]
    return torch.LongTensor(ids).to(device), torch.Tensor(advantage).to(device)


def optimizer_step(model, optimizer, lr, max_grad_norm):
    """Clip, step, clear -> the norm before clipping. UserError: it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm, foreach=False)
    require(norm.isfinite(), f"the gradient's norm is {norm:g}; stopped before the weights moved.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def train_step(
    student, teacher, examples, write, loss, optimizer, lr, token_budget=8192, max_grad_norm=1.0,
    chunk=24_000_000,
):
    """One step of RSD and, by other choices, of every method -> (episodes, figures).

    write(examples) -> the step's episodes with their completions. loss: `token_loss` with its
    options set. teacher None: none is asked. Figures: means per trained token, their number, the
    gradient's norm, seconds, also by part. One denominator serves the whole step, so any split into
    micro-batches gives the same gradient.
    """
    watch = Stopwatch()
    episodes = write(examples)  # 1. y ~ p_S(. | x)
    watch.lap("s_sampling")
    trained = sum(len(e.completion_ids) for e in episodes)
    count = max(1, trained)  # N of the whole step
    sums = Counter()
    for batch in micro_batches(episodes, token_budget):
        columns = ((e.prompt_ids, e.teacher_ids, e.completion_ids) for e in batch)
        contexts, views, completions = zip(*columns)
        # Autocast would keep its copies of the weights to the end of the block: no cache.
        with torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available(), cache_enabled=False):
            with torch.no_grad():  # 2. rubric in view
                teacher_hidden = rescore(teacher, views, completions) if teacher else None
            watch.lap("s_rescoring")
            hidden = rescore(student, contexts, completions)  # 3. from the question alone
            sums.update(  # 4. the gradient of sum_t D / N
                backward_in_chunks(
                    loss, student, hidden, teacher, teacher_hidden,
                    flatten(batch, student.device), count, chunk,
                )
            )
            watch.lap("s_update")
    norm = optimizer_step(student, optimizer, lr, max_grad_norm)  # 5. one step
    watch.lap("s_update")
    figures = {name: total / count for name, total in sums.items()}
    figures |= {"trained": trained, "grad_norm": norm, "lr": lr} | watch.seconds
    figures["seconds"] = watch.seconds.total()
    return episodes, figures


def make_teacher(model, kind):
    """fixed, ema: a frozen copy of the weights in memory, fixed ones in bfloat16 on a GPU. live:
    the student itself. Of a LoRA only the adapters are copied: they begin at 0, so that the copy is
    the base model."""
    if kind == "live":
        return model
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    teacher = copy.deepcopy(model, shared).eval()  # deepcopy leaves what is in `shared` as it is
    for p in teacher.parameters():  # not the buffers: rotary angles need float32
        if p.requires_grad and kind == "fixed" and p.is_cuda:
            p.data = p.data.bfloat16()
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher, student, decay):
    """teacher <- decay * teacher + (1 - decay) * student, parameter by parameter."""
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.lerp_(s, 1 - decay)


def batches(items, size, seed):
    """Batches without end: epoch after epoch, each in an order of its own."""
    ordered = []
    for epoch in itertools.count():
        ordered += random.Random(f"{seed} {epoch}").sample(items, len(items))
        while len(ordered) >= size:
            yield ordered[:size]
            del ordered[:size]


def train(
    student, teacher, examples, write, loss, optimizer, steps=100, batch=32, lr=5e-6, warmup=5,
    seed=0, start=0, ema_teacher=None, ema_decay=0.99, **options,
):
    """The loop: yields (step from 1, episodes, figures) after each step, for a caller that logs
    and saves. The batch and the draws of a step depend on seed and number alone: with weights,
    optimizer and teacher restored, a run that begins again at `start` is the same run. The learning
    rate rises over `warmup` steps and is constant then. teacher None: it is not asked. ema_teacher:
    the one that follows the student, also where it only writes and is not asked. options: those
    of `train_step`.
    """
    of_steps = itertools.islice(batches(examples, batch, seed), start, steps)
    for step, some in enumerate(of_steps, start + 1):
        torch.manual_seed(crc32(f"{seed} {step} 0".encode()))  # the 0: draws as in older runs
        lr_now = lr * min(1.0, step / max(1, warmup))
        episodes, figures = train_step(
            student, teacher, some, write, loss, optimizer, lr_now, **options
        )
        if ema_teacher:
            ema_update(ema_teacher, student, ema_decay)
        yield step, episodes, figures


# ---- 5. Rubrics: read what a model wrote, write new ones -----------------------------------------


def load_prompts(folder):
    """Every prompt file FOLDER/NAME.txt as {NAME: text}; U+FFFD stands for what is no UTF-8."""
    return {
        path.stem: path.read_text("utf-8-sig", errors="replace").strip()
        for path in Path(folder).glob("*.txt")
    }


def valid_unicode(text):
    """The text, with U+FFFD for each half of a surrogate pair, which no file or tokenizer takes."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text).strip()


def as_text(cell):
    """A cell of a table, or a message's content, as text. Of a conversation all turns are kept, of
    a list all parts; nothing, and NaN, are empty."""
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, dict):  # a turn, or a part of one
        speaker = f"{cell['role'].capitalize()}: " if "role" in cell else ""
        return speaker + as_text(cell.get("text", cell.get("content", str(cell))))
    if isinstance(cell, list):
        text = "\n\n".join(map(as_text, cell))
        return text.removeprefix("User: ") if len(cell) == 1 else text
    return valid_unicode(str(cell))


THINKING_TAG = regex.compile(  # <think>, </seed:think>, <|end_of_thought|>, <|channel|>analysis
    r"(?i)[<◁]\|?(?P<closes>/|end_)?[\w:]*(?:think|thought|reason|analysis|scratchpad)"
    r"[^<>/]{0,40}?(?P<closes>_end)?\|?[>▷]|\[(?P<closes>/)?think\]"
    r"|(?P<closes><channel\|>|(?:<\|channel\|>|assistant)final(?:<\|message\|>)?)"
    r"|<\|channel\|?>(?!final)|\A\s*analysis(?-i:[A-Z])"
)


def after_thinking(text):
    """What stands behind the last tag of a thinking, where that closes one; None where it opens
    one. If the prompt opened it, the text has the closing tag alone."""
    behind = text
    for tag in THINKING_TAG.finditer(text):
        behind = text[tag.end() :] if tag["closes"] else None
    return behind


LATEX_BACKSLASH = re.compile(
    r"\\\\|\\(?="  # one that is escaped, or that has to be, since behind it stands
    r"[bfrt][a-z]"  # \beta, \frac, \rho, \theta: JSON would take \f for a form feed
    r"|n(?:u|eq|abla|e(?![.)]))(?![a-zA-Z])"  # \nu, \neq, \nabla, \ne, but no new line
    r'|u(?![\da-fA-F]{4})|[^"\\/bfnrtu])'  # \underline, \Delta: no escape of JSON
)


def make_criterion(title="", description="", weight=None, **_):
    """A criterion of these fields. ValueError: a description without words, no finite weight."""
    number = float(str(weight))
    if not re.search(r"[^\W_]", description) or not math.isfinite(number):
        raise ValueError("a criterion needs a description in words and a number as its weight")
    return {
        "title": valid_unicode(title),
        "description": valid_unicode(description),
        "weight": int(number) if number.is_integer() else number,
    }


def read_array(text, at):
    """The values of a JSON array, the first of which begins at `at`, and where reading stopped."""
    objects = []
    try:
        while True:
            item, end = json.JSONDecoder(strict=False).raw_decode(text, at)
            objects.append(item)
            at = regex.match(r"[\s,]*", text, pos=end).end()
    except (ValueError, RecursionError):
        return objects, at


def parse_rubric(text, row=None):
    r"""What a model wrote -> (criteria, "") or (None, why not). Of the JSON arrays of criteria the
    longest is taken, the last of equal ones. A cut costs only the object that it meets, but behind
    long prose an array without an end is thinking. All else that is broken is to be drawn again.

    >>> parse_rubric('<think>hm</think>[{"title": "Law", "description": "Uses \\nu", "weight": 2}')
    ([{'title': 'Law', 'description': 'Uses \\nu', 'weight': 2}], '')
    """
    text = after_thinking(text)
    if text is None:
        return None, "unfinished thinking"
    text = LATEX_BACKSLASH.sub(r"\\\\", text)
    best, end, reason = [], 0, "no JSON array of criteria"
    for match in re.finditer(r"\[\s*(?=\{)", text):
        if match.start() < end:  # within the last array
            continue
        objects, end = read_array(text, match.end())
        if not text.startswith("]", end) and ("]" in text[end:] or match.start() > 300):
            reason = "its JSON is broken, or unfinished thinking"
            continue
        try:
            best = max([make_criterion(**item) for item in objects], best, key=len)
        except (ValueError, TypeError) as error:
            reason = f"a criterion is broken ({error})"
    return (best, "") if best else (None, reason)


AVOIDS = re.compile(
    r"(?i)(?:pitfall[^:]{0,20}: )?(?:(?:(?:the|an?) \w+|this|it|response) )?"  # label, subject
    r"(?:(?:do|should|must|can|may) ?n[o'’]t|warns? against"
    r"|(?:(?:should|must) (?:\w+ly )?)?(?:avoid|refrain)s?\b)"
)


def signed_weight(criterion):
    """What meeting a criterion is worth, below 0 for a fault: its weight. RaR's pitfalls are
    faults, whatever sign they have, unless their main verb is one of avoiding: a good answer meets
    "must not ...", a bad one "Fails to warn against ..."."""
    weight = criterion["weight"]
    if not re.match("(?i)pitfall", criterion["title"]):
        return weight
    return abs(weight) if AVOIDS.match(criterion["description"]) else -abs(weight)


PLACEHOLDERS = set(  # of prompt files
    "question box answer reference solution rubric rubric_json response statements fence"
    .split()
)


def row_fields(row):
    """What a row can put into the placeholders of a prompt file; what it lacks is left out."""
    rubric = row.get("rubric") or []
    lines = []
    for c in rubric:
        text = f"{c['title']}: {c['description']}".removeprefix(": ")
        lines.append(f"- {text} ({signed_weight(c):g})")
    unchecked = [make_criterion(**c) for c in rubric]
    answer = row.get("reference_answer")
    fields = row | {
        "answer": answer,
        "reference": answer and "Reference answer: " + answer,
        "rubric": "\n".join(lines),
        "rubric_json": rubric and json.dumps(unchecked, ensure_ascii=False),
        "statements": "\n".join(f"- {c['description']}" for c in rubric),
        "fence": str(random.Random(row.get("response", "")).random()),  # of this response alone
    }
    filled = {name: text for name, text in fields.items() if text}
    return {"box": "", "reference": ""} | filled


class Written(NamedTuple):
    """What comes back from a writer for one prompt."""

    text: str | None  # None: it was refused
    tokens: int | None  # None: a server that does not say
    stopped: bool  # False: cut off at the limit
    refused: str = ""  # why there is no text


def write_until_read(write, asked, read, name, tries=3):
    """Ask `write` for each (row, prompt), again for those that `read` (text, row -> value or None,
    reason) cannot use, `tries` times at most. Yields (index, the last try) as they come: {"text",
    "tokens", "truncated", name: the value or None, "reason", "tries"}. write(prompts) yields
    (index, Written), in any order."""
    waiting = range(len(asked))
    for attempt in range(1, tries + 1):
        unread = []
        for place, (text, tokens, stopped, refused) in write([asked[i][1] for i in waiting]):
            i = waiting[place]
            value, reason = (None, refused) if refused else read(text, asked[i][0])
            if value is None and not refused and attempt < tries:
                unread.append(i)
                continue
            yield i, {
                "text": text,
                "tokens": tokens,
                "truncated": not stopped,
                name: value,
                "reason": reason,
                "tries": attempt,
            }
        waiting = unread


def generate_rubrics(write, asked, parse, tries=3):
    """r ~ the generator: one rubric for each (row, prompt). `write` is one of the writers of
    section 7, `parse` is `parse_rubric`; {"rubric": None, "reason": why} where no try could be
    read."""
    return write_until_read(write, asked, parse, "rubric", tries)


# ---- 6. Grading: one grader for rewards and for results ------------------------------------------
#
# The reference alone decides what kind of answer is wanted, in this order:
#   1. An option's letter ("(b)", "B) the lamp"): the answer names it and no other. Or yes,
#      no, true, false, whatever is said behind it.
#   2. A number, perhaps with a unit: exact, or within 1 % if it has a decimal point or an
#      exponent and is no money. A bare number also meets degrees, per cent, money,
#      counted things; any unit if need_unit is False.
#   3. A formula (mathematical signs and no words): math_verify decides, which looks at no
#      unit; n/a (None) where it is not installed or cannot read the reference. It also
#      reads the formulas that answer 2.
#   4. A text of up to 40 characters: the same text. Case counts in symbols (Co is not
#      CO), not in words, and a plural is the same word.
#   5. All else is prose: n/a, since it takes a judge. n/a is never 0.
#
# Of the text that is graded only what stands behind the thinking counts, and of that the
# last \boxed{} or list of them; without one, what the last "answer is" names; else the
# last line.

BOXES = regex.compile(  # a box, or a list of them
    r"(?:(?:boxed|fbox|framebox)\b *(?!\{ *\})"
    r"(?:\{(?P<box>(?P<in>(?:(?!boxed)[^{}]|\{(?&in)\})*+))\}?|(?P<box>\d))"
    r"(?:[}$]*(?:,? ?and|[,;])[$\s\\]*)?)+"
)
NAMED_ANSWER = re.compile(
    r"(?im)^.*(?<!/)\b(?:answers?|choice|option)\b"
    r"(?:[^.\n]{0,60}?(?:\b(?:is|are|be)\b|[:=>])|\W*\n)[\s:*]*"
    r"(\S.*?)(?=</|\.?$|\. +[A-Z]|,? (?:because|since|as)\b| \([a-z]{2})"  # the sentence goes on
)


def extract_answer(text):
    r"""The last \boxed{}, and those before it in the same list; without one, the last named answer;
    or the last line."""
    text = after_thinking(text) or ""
    boxes = [", ".join(dict.fromkeys(match.captures("box"))) for match in BOXES.finditer(text)]
    lines = re.findall(r"(?m)^[^\w\n]*\w.*", text)
    answers = boxes or NAMED_ANSWER.findall("\n".join(lines)) or lines or [""]
    return answers[-1].strip(" *_`#")


SIGNS = dict(pair.split(",") for pair in (  # of LaTeX's commands, if any, and of units
    "alpha,α beta,β gamma,γ delta,δ epsilon,ε theta,θ lambda,λ mu,μ nu,ν pi,π rho,ρ sigma,σ tau,τ "
    "phi,φ omega,ω Gamma,Γ Delta,Δ Theta,Θ Lambda,Λ Pi,Π Sigma,Σ Phi,Φ Psi,Ψ Omega,Ω ohm,Ω circ,° "
    "degree,° times,× cdot,· approx,≈ infty,∞ le,≤ leq,≤ ge,≥ geq,≥ neq,≠ lor,∨ land,∧ lnot,~ "
    "neg,~ to,→ rightarrow,→ text, textbf, textit, textrm, textnormal, mathrm, mathbf, mathit, rm, "
    "bf, mbox, operatorname, left, right, quad, qquad, thinspace, meter,m metre,m gram,g second,s "
    "joule,J newton,N watt,W volt,V kelvin,K celsius,C pascal,Pa hertz,Hz coulomb,C tesla,T "
    "ampere,A liter,L litre,L mole,mol mile,mi sec,s minute,min h,hour hr,hour "
    "kilometer,km centimeter,cm millimeter,mm kilogram,kg percent,% %,%").split())
DRESS = {  # what changes no answer -> its plain spelling, in this order
    r" ?(?:±|\\pm|\+/-) ?0?\.\d+": "",  # how uncertain it is
    r"10\*\*(?=-?\d)": "10^",
    r"\\([A-Za-z]+|%)": lambda name: SIGNS.get(name[1], name[0]),
    r"(?:\\\$|^\$(?=[^$]+$)) ?([\d.,]+)": r"\1 dollars",  # a $ that opens no formula
    r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))": "",  # 12,345
    r"(?:(?<=[\d{}.])~|~(?=\d)|\\\W|\*\*|__|[{}$`\s])+": " ",  # blanks, in LaTeX and Markdown
    r" ?\^ ?": "^",
    r"\^?([μ°]) ?": r"\1",
    r"(?<=[\d.]) ?[x×·*] ?10\^": " 1e",  # 2 × 10^3
    r"\b10\^": "1e",
    " million": "e6",
    r"(?<!\\)\b(?:[A-Z]?[a-z]{2,}|[A-Z]{3,}|No|In)\b": lambda word: word[0].lower(),  # no NaCl, Hz
    r"(?:(?<=[a-z]{3}[a-tv-z])|(?<=ohm|sec|min|bar))s\b": "",  # a plural
    " per ": "/",
    r"\bmph\b": "mi/h",
}
LETTER = re.compile(r"\b[A-J]\b(?! (?!is\b)[a-z])|(?<=[(\[])[a-j](?=[)\]])|^[a-j]$")
# "(b)", "Option B", "B) the lamp", but not "(a) 1 (b) 2":
OPTION = re.compile(r"(?i)(?:[ .:(\[]|option|answer)*([a-j])(?:[)\]](?!.*\b[a-j]\))|\.?$)")
UNIT = r"(?![a-cefi-kn-rt-z]\b)[A-Za-zμΩÅ°%']+(?:\^?-?\d\d?)?"  # no variable
NUMBER = re.compile(
    r"(?:[^\W\d][\w'^().\\ ]*[=:] ?)*(?:[^,;:=≈]*≈ ?)?"  # x = 2√3 ≈
    r"(?P<size>[-+]?(?=\.?\d)\d{0,4000}(?:/[1-9]\d{0,99}|(?:\.\d{1,4000})?(?:(?: 1)?e-?\d{1,4})?))"
    rf"(?!\d) ?(?P<unit>(?:/?{UNIT}(?:[ /·*.()]+{UNIT})*\)?)?)[ .]*"
)
COUNTED = re.compile(r"[°%]|(?!mmol|kcal)[a-z]{4,}")
FORMULA = re.compile(r"(?!.*(?:\d[:_]\d|0x|(?<!\\)\b[A-Za-z]{4}|[A-Z][a-z]?_?\d)).*[-\\^=+*/π∞\d]")


def ascii_signs(text):
    """Unicode's signs as LaTeX has them: "s²" -> "s^{2}", "½" -> "1/2"."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", text).replace("√", r"\sqrt ")
    return unicodedata.normalize("NFKC", text).translate(str.maketrans("⁄−–⋅¬", "/--·~"))


def plain(text):
    r"""One plain spelling: "$5\ \mathrm{m/s^2}$" -> "5 m/s^2", "Carbon" -> "carbon"."""
    text = ascii_signs(text)
    for pattern, spelling in DRESS.items():
        text = re.sub(pattern, spelling, text)
    return text.strip()


def unit_of(text):
    """{symbol: power} of a unit, so that "kJ/mol" and "kJ mol^-1" are the same."""
    powers = Counter()
    for sign, factors in zip((1, -1), text.split("/", 1)):
        for symbol, power in re.findall(r"([^\W\d]+|[°%'])\^?(-?\d+)?", factors):
            powers[SIGNS.get(symbol) or symbol] += sign * int(power or 1)
    return powers


def same_number(given, wanted, tolerance, need_unit):
    """Have two matches of NUMBER the same value, and units that go together?"""
    unit, wanted_unit = unit_of(given["unit"]), unit_of(wanted["unit"])
    is_needed = need_unit and not all(map(COUNTED.fullmatch, wanted_unit))
    if wanted_unit and unit != wanted_unit and (unit or is_needed):
        return False
    x, y = (Fraction(number["size"].replace(" 1", "")) for number in (given, wanted))
    if not (unit or need_unit or "e" in given["size"]):  # 3 may stand in units of 10^-19 J
        y = Fraction(wanted["size"].split()[0])
    if tolerance is None:
        is_money = wanted_unit.keys() & {"%", "dollar", "cent"}
        is_measured = re.search("[.e]", wanted["size"])
        tolerance = 0.01 if is_measured and not is_money else 0
    return abs(x - y) <= Fraction(tolerance) * abs(y)


def same_formula(given, wanted):
    """Are they equal, or rounded alike? None: math_verify is missing, or cannot read `wanted`."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def read(text):
        text = re.sub(r"\\text\{ ?(?:for|where|if)\b\D*$", "", text)  # a remark
        return parse(f"${ascii_signs(text).replace('$', '')}$")

    formula = read(wanted)
    if len(formula) < 2:  # not a value and its text
        return None
    decimals = re.search(r"\.(\d+)|$", wanted)[1] or "000000"
    return verify(formula, read(given[:300]), float_rounding=len(decimals))


def grade(answer, reference, tolerance=None, need_unit=True):
    """Is the extracted answer the reference? True, False, or None for n/a, as above.

    tolerance: relative, for every number; None: 0.01 for measured ones, else exact.
    need_unit: a physical unit has to be there.
    >>> grade("719 C", "720 C"), grade("720", "720 C"), grade("(b)", "B")
    (False, False, True)
    """
    given, wanted = map(plain, (answer, reference))
    option = OPTION.match(wanted)
    if option:
        label = re.split(r"[.:)\]] (?=\w\w)", given)[0]  # of "B. the lamp"
        return set(map(str.upper, LETTER.findall(label))) == {option[1].upper()}
    if wanted in "yes no true false".split():  # whatever is said behind it
        return re.match(r"\w*", given)[0] == wanted
    number, wanted_number = map(NUMBER.fullmatch, (given, wanted))
    if wanted_number and number:
        return same_number(number, wanted_number, tolerance, need_unit)
    if wanted_number or FORMULA.match(wanted):
        same = same_formula(answer, reference)
        return bool(same) if wanted_number else same  # a number is never n/a
    x, y = (re.sub(r"[ ,\\_]", "", text).strip("().") for text in (given, wanted))
    return x == y if re.fullmatch(r"[^\\^=+]{1,40}", wanted) else None


def rubric_score(rubric, met):
    """Points of the criteria met over the positive points, in [0, 1] (HealthBench); of a rubric of
    faults only, the share of them that is absent. None without a rubric, or without a verdict on
    each criterion."""
    if not met or None in met:
        return None
    weights = list(map(signed_weight, rubric))
    earned = sum(itertools.compress(weights, met))
    best = sum(w for w in weights if w > 0)
    worst = sum(weights)
    if best:
        return max(0.0, earned / best)
    return 1 - earned / worst if worst else None


def accuracy(text, row):
    """Is the text's answer the row's? None (n/a) where that takes a judge, or math_verify, which
    is settled by the reference alone."""
    return grade(extract_answer(text), row["reference_answer"], **row.get("grading", {}))


def check_criterion(criterion, text, seconds=2.0):
    """Does the text meet the criterion's `check`, a regular expression? None without one.
    UserError: the search takes longer than that."""
    if "check" not in criterion:
        return None
    check = criterion["check"]
    with user_error(f"the check {check!r} of a criterion has to be mended"):
        return bool(regex.search(check, after_thinking(text) or "", timeout=seconds))


def score(text, row):
    """{"accuracy": True or False, "rubric_score": 0 to 1}, each None where it takes a judge: a
    reference that `grade` calls n/a, and criteria without a `check` to search for."""
    rubric = row.get("own_rubric", row.get("rubric"))
    met = [check_criterion(c, text) for c in rubric or ()]
    return {"accuracy": accuracy(text, row), "rubric_score": rubric_score(rubric, met)}


def score_rubric(rubric, row):
    """A generated rubric: is it valid, and how many criteria has it?"""
    return {"valid": bool(rubric), "criteria": rubric and len(rubric)}


VERDICT = re.compile(  # a word that stands as a value
    r"(?m)(?:^[^a-z\n]*|[^\w\s*/#][\s*]*|(?<=true|alse) )"
    r"(true|yes|false|no)(?!\w| (?!because|since|true|false)\w)"
)


def read_verdicts(text, row):
    r"""A judge's verdicts -> ([bool] * len(row["rubric"]), "") or (None, why not). They are the
    last list or paragraph of exactly as many booleans, or the whole text; in JSON or one a line.

    >>> read_verdicts("1. true\n2. false (no unit)", {"rubric": [{}, {}]})
    ([True, False], '')
    """
    text = after_thinking(text)
    if text is None:
        return None, "unfinished thinking"

    # Of what stands in quotes a verdict stays, and a remark goes.
    text = re.sub(r'"(true|false|yes|no)"|"[^"\n]*"', r"\1", text.lower())
    for run in reversed([text, *re.split(r"[\[\]]|\n\s*\n|(?<=[.!] )(?=1[.:)] )", text)]):
        verdicts = [word in ("true", "yes") for word in VERDICT.findall(run)]
        if len(verdicts) == len(row["rubric"]):
            return verdicts, ""
    return None, "not a verdict for each one"


def judge(write, asked, tries=3):
    """For each (row, prompt of a judge) the verdicts on the row's response, criterion by criterion:
    (index, {"judge": list of bools or None, "reason", ...}). The prompt shows no weights."""
    return write_until_read(write, asked, read_verdicts, "judge", tries)


def mean_se(values):
    """Mean, standard error and number of the values that are not None."""
    known = [v for v in values if v is not None]
    n = len(known)
    mean = statistics.fmean(known) if n else None
    return mean, statistics.stdev(known) / n**0.5 if n > 1 else 0.0, n


def mean_scores(scores):
    """A list of scores, of the same names -> the mean of each."""
    return {name: mean_se([s[name] for s in scores])[0] for name in scores[0]}


def evaluate(samples):
    """(question, scores), k times a question -> the mean scores of each question."""
    groups = {}
    for question, scores in samples:
        groups.setdefault(question, []).append(scores)
    return [mean_scores(group) for group in groups.values()]


def group_advantages(rewards, group, eps=1e-4):
    """GRPO: (r - mean) / (std + eps) in each run of `group` rewards; equal ones give exactly 0 (eps
    above 0)."""
    advantages = []
    for start in range(0, len(rewards), group):
        run = rewards[start : start + group]
        mean, std = statistics.mean(run), statistics.pstdev(run)  # both are exact
        advantages += [(r - mean) / (std + eps) for r in run]
    return advantages


# ---- 7. Who writes: this process's model or a server's, behind one call --------------------------


def stop_ids(model, tokenizer):
    """All tokens that end a completion: the generation config's, the tokenizer's, the chat's."""
    own = model.generation_config.eos_token_id  # one id, a list of them (Qwen has two), or None
    own = own if isinstance(own, list) else [own]
    stop = {*own, tokenizer.eos_token_id, turn_end(tokenizer)} - {None}
    require(stop, "the model has no token that ends a turn: its tokenizer needs an eos_token.")
    return stop


def turn_end(tokenizer):
    """The control token with which the chat template ends an assistant's text, else the eos."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "@"}]
    ids, eos = chat_ids(tokenizer, chat * 2), tokenizer.eos_token_id
    behind = tokenizer.decode(ids).rpartition("@")[2].strip()
    if ids.count(eos) < 2:  # else the eos ends every turn
        for name, i in control_tokens(tokenizer).items():
            if behind.startswith(name):
                return i
    return eos


JUST_TEXT = "{{ messages[0]['content'] }}"  # a chat template for a text that is no chat


def reference_writes(tokenizer, examples, longest=math.inf):
    """Choice 1, who writes: the row's reference solution stands in the completion's place. One that
    is, with its prompt, over `longest` tokens is left out, and counted."""
    require(
        not written_text(tokenizer, examples[0].prompt_ids, []),
        "the chat template opens a thinking, which the references lack.",
    )
    end = turn_end(tokenizer)
    episodes = []
    for e in examples:
        solution = {"role": "assistant", "content": e.row["solution"]}
        ids = chat_ids(tokenizer, [solution], JUST_TEXT) + [end]
        if len(e.prompt_ids + ids) <= longest:
            episodes.append(replace(e, completion_ids=ids, stopped=True))
    say("left out", len(examples) - len(episodes), "references that are too long for the model")
    require(episodes, "no reference is short enough for the model.")
    return episodes


def written_text(tokenizer, prompt, ids):
    """The text that the ids of a completion say, without special tokens. But the tags of a thinking
    stay; the prompt's end may open one."""
    is_open = after_thinking(tokenizer.decode(prompt[-12:])) is None
    text = tokenizer.decode(ids)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and not THINKING_TAG.match(token.content):
            text = text.replace(token.content, "")
    return "<think>" + text if is_open else text


@dataclass
class ModelWriter:
    """A model of this process. Its prompts are token ids; `sample`, as `model_writes` takes it,
    does the writing."""

    sample: Callable
    tokenizer: object
    room: float  # the longest prompt, in tokens
    thinking: bool = False
    size: int = 64  # prompts at a time

    def prompt(self, template, fields):
        """The ids of one prompt."""
        return context_ids(self.tokenizer, template, fields, self.thinking)

    def __call__(self, prompts):
        """Yields (index, Written) for each prompt."""
        for start in range(0, len(prompts), self.size):
            completions = self.sample(prompts[start : start + self.size])
            for i, (ids, stopped) in enumerate(completions, start):
                text = written_text(self.tokenizer, prompts[i], ids)
                yield i, Written(text, len(ids), stopped)


def sample_compiled(model, twin, prompts, stop, max_new_tokens, stage=512, **sampling):
    """`sample_completions` with a static cache, by a twin of the model, as `make_teacher` makes it,
    which takes over the model's weights first.

    On a GPU transformers compiles the decoding, which is four times as fast. Attention runs over
    the whole cache, however much of it is filled, so a long completion is written in stages of
    `stage` tokens, each with a cache of the size it needs.
    """
    twin.load_state_dict(model.state_dict())  # in place: the compiled graphs know the places
    written = [([], False)] * len(prompts)
    for done in range(0, max_new_tokens, stage):
        unfinished = [i for i, (_, stopped) in enumerate(written) if not stopped]
        begun = [prompts[i] + written[i][0] for i in unfinished]
        begun += begun[:1] * (-len(begun) % 8)  # few sizes, since each is compiled
        more = sample_completions(
            twin, begun, stop, min(stage, max_new_tokens - done), **sampling,
            multiple=128, cache_implementation="static",
        )
        for i, (ids, stopped) in zip(unfinished, more):
            written[i] = written[i][0] + ids, stopped
    return written


@dataclass
class ServerWriter:
    """NAME@URL: a model behind an OpenAI-compatible server, batch_size requests at a time. Its
    prompts are texts. The key is $OPENAI_API_KEY. The protocol has no top_k and no thinking."""

    server: str
    sampling: dict
    timeout: float = 600.0  # seconds, of one try
    answered: bool = False
    room = math.inf

    def __post_init__(self):
        self.model, _, address = self.server.partition("@http")
        self.url = "http" + address.partition("/v1")[0].rstrip("/")
        self.options = {
            "max_tokens": self.sampling["max_new_tokens"],
            "temperature": self.sampling["temperature"],
            "top_p": self.sampling["top_p"],
        }

    def prompt(self, template, fields):
        """The text of one prompt; a space inside breaks what may be a control token in the data."""
        control_token = r"<(?=\S{,40}>)|\[(?=/?[A-Z]+\])"
        return fill(template, fields, lambda data: re.sub(control_token, r"\g<0> ", data))

    def __call__(self, prompts):
        """Yields (index, Written) for each prompt, as they come. UserError: none of the first
        ten is answered."""
        with ThreadPool(self.sampling["batch_size"]) as pool:  # its threads die with the process
            answers = pool.imap_unordered(self.request, enumerate(prompts))
            for count, (i, written) in enumerate(answers, 1):
                self.answered |= not written.refused
                goes_on = self.answered or count < min(10, len(prompts))
                require(goes_on, f"--model {self.server} answers no prompt: {written.refused}")
                yield i, written

    def request(self, numbered):
        """(index, prompt) -> (index, Written). What may pass is tried again after 1, 2, 4 ... 64 s,
        or as many as Retry-After says. OpenAI's newer models take another set of options."""
        i, prompt = numbered
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # not the hub's
        asked = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        pause = 0
        for attempt in range(8):
            time.sleep(pause)
            pause, said = 2**attempt, ""
            try:
                response = get_session().post(
                    f"{self.url}/v1/chat/completions", headers={"Authorization": f"Bearer {key}"},
                    json=asked | self.options, timeout=self.timeout, follow_redirects=False,
                )
                said = f"{response.status_code} {response.text!r:.200}"
                pause = min(600, abs(float(response.headers.get("Retry-After", pause))))
                if response.status_code == 200:
                    return i, self.read(response.json())
            except Exception as error:  # of the connection, or of JSON of another form
                said = said or f"{error!r:.200}"
            if "Unsupported parameter" in said:
                self.options = {"max_completion_tokens": self.sampling["max_new_tokens"]}
            elif re.match(r"3|4(?!08|29)|\D.*(OFFLINE|refused|not known)", said):
                break  # these do not pass
        return i, Written(None, None, False, f"the server says {said}")

    def read(self, reply):
        """A server's reply -> Written. Errors of many kinds: it has no answer."""
        choice = reply["choices"][0]
        reason = str(choice.get("finish_reason")).lower()
        require(not re.search("error|resource", reason), reason)
        content = choice["message"].get("content")
        if isinstance(content, list):  # parts, some of them a thinking
            content = [part for part in content if "text" in part]
        tokens = (reply.get("usage") or {}).get("completion_tokens")
        known = tokens if isinstance(tokens, int) and tokens < 10**9 else None
        is_cut_off = re.search("length|max_tokens|filter", reason)
        return Written(as_text(content), known, not is_cut_off)


# ---- 8. Files: checkpoints, and lines that go on -------------------------------------------------


def lock(path):
    """Open a file to append to it, for this process alone until it is closed. UserError: another
    one has it, or it is no file."""
    import fcntl  # not on Windows

    require(path.is_file() or not path.exists(), f"--out {path}: it is no file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8", errors="replace")
    with user_error(f"--out {path}: another process writes there; choose another"):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


# The folder of a run holds metrics.jsonl and its last two checkpoints. Each is a folder of its own,
# written under a hidden name and renamed once it is whole and on the disk; before one is removed it
# gets the hidden name again. So checkpoint-N is whole, at whichever moment the process is killed.

LOCK = "rsd.lock"  # the folder that holds this file is a run's
MAY_CHANGE = (  # settings that may change where a run goes on
    "out resume steps save_every given "
    "token_budget batch_size gradient_checkpointing compile"  # but then not to the bit
).split()


def last_checkpoint(folder):
    """The last checkpoint-N of the run in this folder; None if there is none."""
    from transformers.trainer_utils import get_last_checkpoint  # this import takes a second

    return get_last_checkpoint(folder) if Path(folder, LOCK).exists() else None


def to_disk(path):
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(out, state, student, teacher, optimizer, tokenizer):
    """Write checkpoint-N after N steps, as state["metrics"] counts them, and remove all but the
    last two. UserError: it cannot be written."""
    shared = set(student.parameters())
    theirs = (teacher or student).named_parameters()
    state["teacher"] = {name: p for name, p in theirs if p not in shared}
    state["optimizer"] = optimizer.state_dict()
    state["saved"].append(len(state["metrics"]))
    *older, new = [out / f"checkpoint-{step}" for step in state["saved"]]

    part = out / ".rsd-part"
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    try:
        with user_error(f"--out {out}: cannot save, the last checkpoint stays"):
            student.save_pretrained(part)  # of a LoRA, the adapters
            tokenizer.save_pretrained(part)
            torch.save(state, part / "trainer.pt")
            (part / "questions.json").write_text(json.dumps(state["questions"]))
            for weights in part.glob("*.safetensors"):  # which only the owner may read so far
                shutil.copymode(part / "trainer.pt", weights)
            for path in [*part.rglob("*"), part]:
                to_disk(path)
            part.rename(new)
            to_disk(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)

    for old in older[:-1]:
        if old.exists() and {*os.listdir(old)} <= {*os.listdir(new)}:  # or the user's are in it
            old.rename(part)
            shutil.rmtree(part)


def open_run(out, settings, resume):
    """The run in the folder `out`, new or as its last checkpoint has it -> (lock, state).

    Keep the lock. state: settings; metrics, a dict for each step; saved, the steps of its
    checkpoints; where it goes on, optimizer and teacher. UserError: `out` holds something else, or
    a run with other settings or without `resume`.
    """
    is_free = not any(out.glob("[!.]*")) or (out / LOCK).exists()
    require(is_free, f"--out {out} is no run of rsd.py; choose another --out.")
    last = last_checkpoint(out)
    held = lock(out / LOCK)
    now = {  # the name alone of a file, since it may move
        name: Path(str(x)).name for name, x in settings.items() if name not in MAY_CHANGE
    }
    state = {"settings": now, "metrics": [], "saved": []}
    if last:
        require(resume, f"--out {out} holds a run already; add --resume, or choose another --out.")
        with user_error(f"{last} is damaged; move it away to go on from the one before"):
            state = torch.load(f"{last}/trainer.pt", map_location="cpu", weights_only=True)
            was = state["settings"]
        other = {name: was.get(name) for name in now if was.get(name) != now[name]}
        require(not other, f"--out {out} holds a run with other settings, which were {other}.")
        say("note: to the bit it goes on with the same --batch-size, --compile and memory flags")
    lines = [json.dumps(figures) + "\n" for figures in state["metrics"]]
    (out / "metrics.jsonl").write_text("".join(lines))
    return held, state


def read_jsonl(path, size=None):
    """The objects of a JSON Lines file, or of its first `size` bytes. UserError names a line that
    is none. OSError: no such file."""
    rows = []
    for number, line in enumerate(path.read_bytes()[:size].split(b"\n"), 1):
        with user_error(f"{path}, line {number}, is no JSON object; mend or remove it"):
            if line.strip():
                rows.append({**json.loads(line)})
    return rows


def open_lines(path, origin):
    """A JSON Lines file of `remember`, locked, and its lines. A last line that was cut off goes.
    UserError: it holds something else, or lines of another origin, and is left as it is."""
    file = lock(path)
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    require(whole or not text, f"--out {path} has no whole line; choose another --out.")
    lines = read_jsonl(path, whole)
    for line in lines:
        other = [name for name in origin if line.get(name) != origin[name]]
        require(not other, f"--out {path} has lines with another {other}; choose another --out.")
    if whole < len(text):
        say(f"--out {path}: its last line was cut off, and is asked for again")
        file.truncate(whole)
    return file, lines


def remember(path, jobs, work, description, origin):
    """Do each distinct job once and keep it in a JSON Lines file, so that a second call goes on.

    jobs: pairs (item: dict, asked); work([asked]) yields (index, answer: dict) as they come, and
    each is kept at once, but for those without a text. Returns the lines item | answer | origin of
    all jobs. UserError: the file has another origin.
    """
    file, old = None, []
    if path:
        file, old = open_lines(Path(path), origin)
    columns, _ = jobs[0]

    def key(line):
        return json.dumps([line.get(name) for name in columns])

    done = {key(line): line for line in old}
    wanted = {key(job[0]): job for job in jobs}  # equal ones are asked once
    todo = [job for k, job in wanted.items() if k not in done]
    say(len(todo), "of", len(jobs), "are still to do (others repeat, or are done)")
    torch.manual_seed(torch.initial_seed() + len(done))  # not the old samples again
    answers = work([asked for _, asked in todo])
    for i, answer in tqdm(answers, description, total=len(todo)):
        item, _ = todo[i]
        line = done[key(item)] = item | answer | origin
        if file and line["text"] is not None:
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
    return [done[k] for k in wanted]


# ---- 9. Seeing the credit: which tokens the rubric moves, and which criterion moves them --------


@torch.no_grad()
def token_credit(student, teacher, prompt, context, without, completion, top=5):
    """What the teacher's context, and each criterion in it, does to the T tokens of a completion.

    Ids in: the student's prompt, the teacher's context, the same without each of K criteria, the
    completion. Out, in nats: gap [T] = log p_T - log p_S; divergence [T] = KL(T || S); credit [K,
    T] = log p_T less log p_T without criterion k; credit_divergence [K, T], the same of the KL; and
    the likeliest student_ids, teacher_ids with their student_p, teacher_p [T, top]. It takes K + 2
    forward passes. Leaving one out shows what it adds to the others: two that say the same get
    about nothing each.
    """
    ids = torch.tensor(completion, device=student.device)

    def logits(model, context):
        return logits_of(model, rescore(model, [context], [completion])).float()

    own = logits(student, prompt)  # [T, V]
    pairs = []
    for view in [*without, context]:  # one at a time; the whole context is the last
        seen = logits(teacher, view)
        pairs.append(torch.stack([log_prob(seen, ids), divergence(own, seen)]))
    likely, kl = torch.stack(pairs, dim=1)  # each [K + 1, T]
    figures = {
        "gap": likely[-1] - log_prob(own, ids),
        "divergence": kl[-1],
        "credit": likely[-1] - likely[:-1],
        "credit_divergence": kl[-1] - kl[:-1],
    }
    for who, x in (("student", own), ("teacher", seen)):
        figures[f"{who}_p"], figures[f"{who}_ids"] = x.softmax(-1).topk(top)
    return figures


def page_skeleton(out):
    """The empty page. UserError: `out` is a file that inspect did not make."""
    skeleton = (HERE / "prompts/inspect.html").read_text("utf-8")
    own = not out.exists() or skeleton[:200].encode() in out.read_bytes()
    require(own, f"--out {out}: inspect did not make it, and does not write over it.")
    return skeleton


def write_page(out, page):
    """The HTML page of rollouts with their credit and of a run's curves, as data in a script."""
    skeleton = page_skeleton(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(page).replace("<", "\\u003c")  # no tag of the data can end the script
    out.write_text(skeleton.replace("{data}", data), "utf-8")


# ---- 10. Models and data -------------------------------------------------------------------------


def hub_name(name):
    """Qwen2.5-1.5B -> Qwen/Qwen2.5-1.5B; a directory or another name as it is."""
    is_bare = re.fullmatch("Qwen[^/]+", name) and not Path(name).is_dir()
    return "Qwen/" + name if is_bare else name


@torch.no_grad()
def check_model(model, tokenizer, name):
    """UserError: its weights are damaged, padding changes what it writes, its head is not
    `logits_of`, tokens lack embeddings, or its template drops text."""
    ids = torch.tensor([[0] * 9 + [1, 2, 3]], device=model.device)
    out = model.generate(  # padded, as in `sample_completions`; a state may fail in the second step
        ids, attention_mask=ids.clamp(max=1), max_new_tokens=2, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )
    own, written = torch.cat(out.logits), out.sequences[0, 12:].tolist()
    ours = logits_of(model, rescore(model, [[1, 2, 3]], [written]))
    bound = 4e-2 if torch.cuda.is_available() else 1e-3  # a GPU rounds to bfloat16
    same = (own - ours).abs().max() <= bound * own.abs().max()  # false for NaN, too
    require(same, f"--model {name}: it gives NaN, padding changes it, or its head is unknown.")
    ids = context_ids(tokenizer, "@@", {})
    has_text = "@@" in tokenizer.decode(ids)
    require(has_text, f"--model {name}: tokenizer or template drops the text of the question.")
    fits = max(ids) < len(model.get_input_embeddings().weight)
    require(fits, f"--model {name}: it has fewer embeddings than the tokenizer has tokens.")


def switch_off_dropout(model):
    """For good: a layer under gradient checkpointing is in training mode, where it drops out."""
    for layer in model.modules():
        for name, rate in vars(layer).items():
            if "drop" in name and isinstance(rate, float):
                setattr(layer, name, 0.0)


def load_model(name, half=False):
    """(model, tokenizer) of a directory, of a run's last checkpoint or of the hub, from safetensors
    only; half: frozen, and in bfloat16 on a GPU. UserError: it is not found, it lacks weights, or
    `check_model` refuses it."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if half and on_gpu else torch.float32
    source = last_checkpoint(name) or hub_name(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with user_error(
        f"--model {name}: there is no such directory or hub name, or no causal language model in "
        "it (a server can generate, eval and judge, no more)"
    ):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    lacking = found["missing_keys"]
    require(not lacking, f"--model {name}: its files lack weights, {lacking!s:.150}.")
    if tokenizer.chat_template is None:
        say(f"note: {name} has no chat template; the plain one is used, the prompt and 'Answer:'")
        tokenizer.chat_template = (HERE / "prompts/plain_chat.jinja").read_text()
    model.requires_grad_(not half)
    if on_gpu:
        model.cuda()
    switch_off_dropout(model)
    check_model(model, tokenizer, name)
    return model, tokenizer


def add_lora(model, rank):
    """Freeze the model; float32 adapters on its linear layers (not on a mixture's fused experts),
    with alpha 2 x rank, train."""
    from peft import LoraConfig  # optional; main says how to get it
    from peft.tuners.tuners_utils import cast_adapter_dtype

    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    cast_adapter_dtype(model, "default")


# Rubrics of files. A criterion is a string, or an object with fields of these names, of which the
# last word counts: "criterion_weight" (ProfBench), "critically_important_weight" (PRBench).
FIELD_NAMES = {
    "title": "title name heading label",
    "description": "description criterion criteria requirement requirements item text statement "
    "content rubric question",
    "weight": "weight points score importance priority percentage",
    "polarity": "type polarity negative",
}
WORD_WEIGHT = {
    "essential": 5, "important": 3, "optional": 1, "pitfall": -1,  # RaR
    "critical": 4, "major": 3, "minor": 2, "additional": 1,  # ProfBench
    "high": 3, "medium": 2, "low": 1,
}
WEIGHT = r"(?P<weight>[-+−–]?(?:\d+(?:\.\d*)?|\.\d+)) ?(?:points?|pts?)?"
STATED = regex.compile(  # how a string states its weight
    r"(?is)\s*(?:(?:[-*•]|\(?\d+[.)])\s+)?(?:"  # a bullet
    rf"(?P<title>(?P<weight>{'|'.join(WORD_WEIGHT)}))(?: criteri\w+)?[ \d]*:(?P<item>.+)"
    rf"|[\[(] ?(?:points?: ?|weight:? ?)?{WEIGHT} ?[\])]:?(?P<item>.+)"  # [5] ...
    rf"|(?=[-+−–]|points?:|[\d.]+ ?(?:points?|pts?)\b)(?:points?: ?)?{WEIGHT}"  # +5: ...
    r" ?(?:[:–-]|, ?item:|(?=[^\W\d]))(?P<item>.+)"
    rf"|(?P<item>.+) [(\[](?=[-+−–]|[^)\]]{{0,20}}[a-z])(?:weight:? ?)?{WEIGHT}[)\]]\.?"
    r"|(?P<item>.*))"  # not at all
)
FORMS = '"States the law", "[5] States the law" or {"description": "States the law", "weight": 5}'
LISTS = "criteria rubric rubrics items positive negative pitfalls".split()
say_once = functools.cache(say)


def field_of(item, meaning):
    """The text or number of an object's field of this meaning; of several all, joined; or ""."""
    names = FIELD_NAMES[meaning].split()
    named = [value for key, value in item.items() if key.lower().split("_")[-1] in names]
    kinds = object if meaning == "weight" else str | int | float  # no weight is passed over
    texts = [str(x).strip() for x in named if isinstance(x, kinds) and x is not None]
    return ": ".join(dict.fromkeys(texts))


def read_criterion(item):
    """An object -> a criterion with title (may be ""), description, weight (1 if none is stated),
    perhaps check. ValueError, or errors of regex for a check: it cannot be read."""
    stated = re.sub("[−–]", "-", field_of(item, "weight").lower())
    if not stated:
        say_once("note: a criterion that states no weight weighs 1")
    word = re.sub(r" ?(points?|pts?)? ?(\([^()]*\))?$", "", stated or "1")
    weight = WORD_WEIGHT.get(word, word)
    if re.search("(?i)(^|: )(negative|penalty|true)", field_of(item, "polarity")):
        weight = -abs(float(weight))
    criterion = make_criterion(field_of(item, "title"), field_of(item, "description"), weight)
    if item.get("check"):
        criterion["check"] = regex.compile(item["check"]).pattern
    return criterion


def criteria_in(value):
    """The criteria of a string, a list, sections or {name: criterion}, one by one, as objects.
    ValueError: there is something else, or a criterion has others within."""
    if isinstance(value, list):
        return sum(map(criteria_in, value), [])
    if isinstance(value, str):
        value = STATED.fullmatch(value).groupdict()
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.60} is no criterion; one is {FORMS}")
    is_criterion = bool(field_of(value, "description"))
    within = []
    for key, part in value.items():
        is_section = isinstance(part, dict) and not is_criterion
        if isinstance(part, list):
            is_section = key in LISTS or dict in map(type, part)
        if is_section:
            sign = {"polarity": "negative"} if "negative" in key or key == "pitfalls" else {}
            within += [item | sign for item in criteria_in(part)]
    if is_criterion == bool(within):
        raise ValueError(f"no criterion, or one with others within; one is {FORMS}")
    return within or [value]


def read_rubric(value):
    """Criteria in any form that files have -> a rubric; None if there are none. ValueError, or
    errors of regex for a bad `check`: something cannot be read. Nothing is read in part."""
    if isinstance(value, str):
        if re.match(r"\s*(?:[{|]|\[\s*[]\"'\[{]|(null|\d+)?\s*$)", value):
            value = json.loads(value.strip() or "[]")
        else:
            value = re.split(r"(?i)\n(?=[ \t]*(?:[-*•] |\d+[.)] |\[|points:))", value)
    return [read_criterion(item) for item in criteria_in(value or [])] or None


def rubrichub_row(raw):
    """RubricHub, science: chats with the reference beside them."""
    return raw | {"reference_answer": raw["reward_model"]["ground_truth"]}


def gpqa_row(raw):
    """GPQA: four options in an order of the question's own; the answer is a letter."""
    columns = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    random.Random(raw["Question"]).shuffle(columns)
    options = [f"{letter}. {raw[name].strip()}" for letter, name in zip("ABCD", columns)]
    return {
        "question": raw["Question"] + "\n\n" + "\n".join(options),
        "reference_answer": "ABCD"[columns.index("Correct Answer")],
        "solution": raw["Explanation"],
    }


def scibench_row(raw):
    """SciBench: a number and its unit, which stands in the question."""
    unit = raw["unit"]
    return {
        "question": raw["problem_text"] + "\n\nGive the answer in this unit: " + unit,
        "reference_answer": raw["answer_number"] + " " + unit,
    }


@dataclass
class DataSet:
    """Where a data set is on the hub, and how its rows are read."""

    hub: str  # owner/name, owner/name:config or a file
    to_row: Callable = dict  # a row with columns of other names -> one whose names are known
    test: str = "test"  # the name of its test split
    overlap: bool = False  # the test split repeats questions of the train split
    grading: dict = field(default_factory=dict)  # options of `grade`


# The toy: problems with exact rubrics, and small models that can do right when told how and do not
# by default. Both are data, made by .ci/make_toy.py; the models are trained from nothing.
TOY = HERE / "prompts/toy"
DATA_SETS = {
    "rar-science": DataSet("ScaleAI/RaR-Science", overlap=True),
    "rubrichub-science": DataSet(
        "hf://datasets/sojuL/RubricHub_v1/RuRL/rurbichub_v1_Science.parquet", rubrichub_row
    ),
    "gpqa-diamond": DataSet("Idavidrein/gpqa:gpqa_diamond", gpqa_row, "train"),
    "scibench": DataSet(
        "xw27/scibench", scibench_row, "train", grading={"tolerance": 0.05, "need_unit": False}
    ),
}
# What a row holds -> the names of the columns that may hold it; the first that is filled counts.
COLUMNS = {
    "question": "question prompt instruction problem input messages",
    "reference_answer": "reference_answer answer output",
    "solution": "solution",
    "response": "response text",
    "sample": "sample",
    "rubric": "rubric rubrics rubric_list criteria checklist",
}


def cell_of(raw, meaning):
    """The cell that has this meaning, or ""; which column is taken for it is said once."""
    for name in COLUMNS[meaning].split():
        if raw.get(name) not in (None, ""):
            if name not in (meaning, "text"):
                say_once(f"note: the column {name} is read as the {meaning}")
            return raw[name]
    return ""


def read_table(data, split="train"):
    """The raw rows of a .jsonl, .json, .csv or .parquet file, of the toy, or of a data set of the
    hub. UserError, or OSError for a .jsonl: they cannot be had."""
    source = DATA_SETS.get(data, DataSet(data))
    path = TOY / f"{split}.jsonl" if data == "toy" else Path(source.hub)
    kind = path.suffix[1:]
    if kind == "jsonl":
        return read_jsonl(path)
    with user_error(
        f"{data}: looked for {source.hub} and could not read it; give a .jsonl, .json, .csv or "
        ".parquet file, a hub id (owner/name or owner/name:config; where its page asks for "
        f"consent, hf auth login), toy or one of {list(DATA_SETS)}; the cause"
    ):
        if kind == "json":
            table = json.loads(path.read_bytes())
            require(isinstance(table, list), "it has to be a list; lines of objects are .jsonl")
            return table
        if kind == "csv":  # all its cells are text
            with open(path, encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, strict=True))
        import datasets  # it takes seconds

        if kind == "parquet":  # datasets calls all of a file its split train
            return datasets.load_dataset(kind, data_files=source.hub, split="train")
        return datasets.load_dataset(
            *source.hub.split(":"), split=source.test if split == "test" else split
        )


def read_row(raw, source):
    """A raw row -> question, reference_answer, solution, response, sample, rubric, which a teacher
    sees and `with_rubrics` may change, own_rubric, which alone grades, grading, perhaps box. Errors
    of many kinds: a column is missing, or a cell cannot be read."""
    require(None not in raw, "it has more cells than names; quote those with a comma")
    cells = {name.strip().lower(): cell for name, cell in source.to_row(raw).items()}
    question = cell_of(cells, "question")
    while isinstance(question, list) and as_text(question[-1:]).startswith("Assistant: "):
        question.pop()  # what was answered is no question
    row = {name: as_text(cell_of(cells, name)) for name in COLUMNS}
    if question == cells.get("instruction"):  # Alpaca's, whose input belongs to it
        row["question"] = as_text([question, cells.get("input")]).strip()
    require(row["question"], f"it needs a column question, filled; it has {', '.join(raw)}")
    if "text" in cells:  # an answer of eval's, which may be empty
        row["response"] = row["response"] or "(no answer)"
    reference, rubric = cell_of(cells, "reference_answer"), read_rubric(cell_of(cells, "rubric"))
    require(not isinstance(reference, dict | list), "its reference is not one text")
    row |= {"rubric": rubric, "own_rubric": rubric, "grading": source.grading}
    if accuracy("", row) is not None:  # the answer can be graded
        row["box"] = r", and put the final answer in \boxed{}"
    return row


def load_rows(data, split="train", limit=0, seed=0):
    """The rows of a data set, the toy's in an order of the seed's own. UserError names the source,
    the row (from 1) and the columns."""
    source = DATA_SETS.get(data, DataSet(data))
    table = read_table(data, split)
    if data == "toy":
        random.Random(seed).shuffle(table)
    rows = []
    for number, raw in enumerate(itertools.islice(table, limit or None), 1):
        with user_error(f"{data}, row {number} ({raw!r:.150})"):
            rows.append(read_row(raw, source))
    require(rows, f"{data} has no rows.")
    turned = sum(signed_weight(c) != c["weight"] for row in rows for c in row["rubric"] or ())
    if turned:
        say(f"note: the wording changes the sign of {turned} pitfalls")
    if source.overlap and split == "test":
        seen = {question_hash(row) for row in load_rows(data)}
        return without_known(rows, seen, "which the train split has, too")
    return rows


def question_hash(row):
    """The hash by which a checkpoint knows the questions that it was trained on."""
    return crc32(row["question"].encode())


def without_known(rows, known, why):
    """Rows less those whose question's hash is known; they are counted."""
    kept = [row for row in rows if question_hash(row) not in known]
    if kept != rows:
        say("left out", len(rows) - len(kept), "rows,", why)
    return kept


def without_trained(rows, model):
    """Rows less those whose question a checkpoint of `train` was trained on; they are counted."""
    trained = Path(last_checkpoint(model) or model, "questions.json")
    known = read_table(str(trained)) if trained.is_file() else ()
    return without_known(rows, set(known), f"on which {model} was trained")


def key_of(row):
    """The key by which rows, rubrics and answers find one another."""
    return row["question"], row["reference_answer"]


def with_rubrics(rows, source):
    """Rows with the rubric from `source`: data; a file of generate, by question and reference; or
    a .json list of criteria, which every row gets."""
    if source == "data":
        return rows
    with user_error(f"--rubrics {source}"):
        if source.endswith(".json"):
            found = dict.fromkeys(map(key_of, rows), read_rubric(read_table(source)))
        else:
            found = {key_of(row): row["rubric"] for row in load_rows(source) if row["rubric"]}
    return [row | {"rubric": found.get(key_of(row))} for row in rows]


def make_examples(rows, templates, reader, needs=None):
    """Rows, prompt files and who reads them -> [(row, a prompt for each file)].

    A row that lacks a field of these files or what else it `needs`, a field or a score, or has a
    prompt for which the reader has no room, is left out, never cut, and counted. UserError: nothing
    is left.
    """
    wanted = [needs or "question", *PLACEHOLDER.findall("".join(templates))]
    examples, dropped = [], Counter()
    for row in tqdm(rows, "contexts"):
        fields = row_fields(row)
        known = score("", row) | fields
        missing = [name for name in wanted if known.get(name) is None]
        if missing:
            dropped[f"no {missing[0]}"] += 1  # a score takes checks or a short reference
            continue
        prompts = [reader.prompt(text, fields) for text in templates]
        if max(map(len, prompts)) <= reader.room:
            examples.append((row, *prompts))
        else:
            dropped["context too long for the model"] += 1
    if dropped:
        say("left out", dropped.total(), "of", len(rows), "rows:", dict(dropped))
    require(
        examples,
        f"no row is left: {dict(dropped)}. Missing rubrics come from generate (--rubrics); perhaps "
        "--max-new-tokens leaves no room for a prompt, or the model was trained on all of them.",
    )
    return examples


# ---- 11. Commands: the only functions that see the command line's arguments ----------------------

LEAK = re.compile("(?i)rubric|criteri|guidance|reference answer|reference solution")
STAGES = {  # what is learned: (the student's prompt file, the teacher's)
    "reason": ("student", None),  # None: --teacher-context or the method says it
    "rubric": ("writer+answer", "writer+answer+rubric"),  # stage 1 as in the paper's code
    "rubric-paper": ("writer", "writer+answer"),  # and as in its text
}
TOY_DEFAULTS = {  # what other defaults --data toy brings
    "data": "toy",
    "prompts": str(TOY),
    "batch_size": 256,
    "max_new_tokens": 220,
    "teacher_context": "rubric+answer",
    "lr": 1e-3,
}

COUNTS = "k n steps batch save_every rollouts max_new_tokens batch_size".split()

# -- the settings: a field is a flag, its class the title under which --help shows it; where a class
# changes the default alone, the help is that of the class below


def flag(default, text, choices=None):
    """A field with its default, its help and, if only these will do, its choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Data:
    """What is asked, and who answers."""

    model: str = flag("toy", "Directory or hub name; for generate, eval and judge also NAME@URL.")
    data: str = flag("rar-science", "Name, hub id or file; with no --model either, the toy.")
    split: str = flag("test", "Split of the data set; a file has none.")
    limit: int = flag(0, "Rows of the data, at most; 0 is all (not for inspect).")
    prompts: str = flag(str(HERE / "prompts"), "Directory of the prompt files.")
    seed: int = flag(0, "Seed of data and sampling, and which of the toy's two models.")


@dataclass
class Sampling:
    """How completions are drawn."""

    thinking: str = flag("off", "Whether the template asks the model to think.", ("off", "on"))
    max_new_tokens: int = flag(4096, "Tokens of a completion, at most.")
    temperature: float = flag(0.7, "Sampling temperature; 0 takes the likeliest token.")
    top_p: float = flag(0.95, "Sample from the likeliest tokens of this mass; 1 is all.")
    top_k: int = flag(20, "Sample from this many of the likeliest tokens; 0 is all.")
    batch_size: int = flag(64, "Completions that are sampled at a time.")
    compile: str = flag("auto", "Compile the sampler; auto: where it pays.", ("auto", "on", "off"))


@dataclass
class Teacher:
    """What a teacher sees; one looks on at temperature 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rubrics: str = flag("data", "data, a .jsonl of generate, or one .json list.")
    teacher_context: str = flag("rubric", "Prompt file that a teacher with rubric sees.")


@dataclass
class Eval(Sampling, Data):
    """python rsd.py eval --model runs/train --data gpqa-diamond --out runs/answers.jsonl"""

    writer: str = flag("student", "Prompt file that the writing model sees.")
    out: str = flag("", "JSON Lines file; what it holds already is not asked again.")
    k: int = flag(1, "Answers to each question; their mean counts.")


@dataclass
class Generate(Sampling, Data):
    """python rsd.py generate --model Qwen2.5-7B-Instruct --limit 3200"""

    split: str = "train"
    max_new_tokens: int = 1024
    writer: str = flag("writer+answer", "Prompt file that the writing model sees.")
    out: str = flag("runs/rubrics.jsonl", "JSON Lines file; what it holds is not asked again.")


@dataclass
class Judge(Generate):
    """python rsd.py judge --model Qwen2.5-7B-Instruct --data runs/answers.jsonl"""

    split: str = "test"
    temperature: float = 0.0
    writer: str = "judge"
    out: str = "runs/verdicts.jsonl"


@dataclass
class Inspect(Teacher, Sampling, Data):
    """python rsd.py inspect --model Qwen2.5-1.5B --compare runs/train"""

    n: int = flag(5, "Held-out questions.")
    compare: str = flag("", "A trained model to show beside the student.")
    run: str = flag("", "Directory of a run whose curves are drawn.")
    out: str = flag("runs/credit.html", "The page.")


@dataclass
class Learning:
    """What is learned, and how."""

    method: str = flag("rsd", "Who writes, what the teacher sees, which signal.", METHODS)
    stage: str = flag("reason", "Learn to reason, or to write rubrics.", STAGES)
    divergence: str = flag("forward", "How teacher and student are compared.", (*BETAS, "sampled"))
    support: int = flag(0, "Compare on so many of the teacher's likeliest tokens; 0: all.")
    tail: bool = flag(False, "With --support: one more bucket for the rest; reverse needs it.")
    clip: str = flag("none", "Cap entries, or the sums, at .05.", ("none", "entry", "token"))
    loss_temperature: float = flag(1.0, "Divides both logits in the divergence.")
    teacher: str = flag("fixed", "Its weights; ema: decay .99.", ("fixed", "ema", "live"))
    kl: float = flag(0.0, "Weight of the reverse KL to the teacher beside an advantage.")
    rollouts: int = flag(1, "Completions of each prompt; GRPO needs 2 or more.")


@dataclass
class Memory:
    """What trades memory for time."""

    token_budget: int = flag(8192, "Padded tokens of a micro-batch; 16,384 suit a large GPU.")
    lora_rank: int = flag(0, "Train adapters of this rank (by peft); 0 is all weights.")
    gradient_checkpointing: bool = flag(False, "Take less memory and more time.")


@dataclass
class Train(Memory, Learning, Teacher, Sampling, Data):
    """python rsd.py train --model Qwen2.5-1.5B --rubrics runs/rubrics.jsonl"""

    split: str = "train"
    out: str = flag("runs/train", "Directory of metrics and checkpoints.")
    resume: bool = flag(False, "Go on with the run in --out.")
    steps: int = flag(100, "Optimizer steps.")
    batch: int = flag(32, "Prompts of one step.")
    save_every: int = flag(50, "Steps between two checkpoints.")
    lr: float = flag(5e-6, "Learning rate at its highest.")
    warmup: int = flag(5, "Steps of linear warm-up.")

    def __post_init__(self):
        """The contexts that a method or a stage decides; UserError for what cannot be trained."""
        method = METHODS[self.method]
        self.student_context, of_stage = STAGES[self.stage]
        decided = {"solution": "solution", None: self.student_context}
        self.teacher_context = decided.get(method.sees, of_stage or self.teacher_context)
        drawn_as_they_are = (self.temperature, self.top_p, self.top_k) == (1, 1, 0)
        on_policy = method.writer == "student" and drawn_as_they_are
        if method.reward and not on_policy:
            say("warning: a policy gradient is only right at temperature 1 from all tokens")
        if self.warmup > self.steps:
            say("warning: --warmup is longer than the run, which never reaches --lr")
        mistakes = {
            "--divergence sampled: only on the student's samples at temperature 1, of all tokens.":
                self.divergence == "sampled" and not on_policy,
            f"--stage {self.stage} goes with --method rsd.": of_stage and self.method != "rsd",
            f"--teacher-context {self.teacher_context}: the teacher has to see more than that.":
                method.signal == "divergence" and self.teacher_context == self.student_context,
            "--loss-temperature: has to be above 0.": self.loss_temperature == 0,
            f"--method {self.method}: needs --rollouts 2 or more.":
                method.reward and self.rollouts < 2,
            "--method rsd-grpo: needs a --kl above 0.": self.method == "rsd-grpo" and not self.kl,
        }
        for sentence, applies in mistakes.items():
            require(not applies, sentence)


@dataclass
class Demo:
    """python rsd.py demo --seed 1 --out runs/demo1"""

    model = "toy"  # this is no flag
    seed: int = flag(0, "Seed of data and sampling, and which of the toy's two models.")
    steps: int = flag(60, "Training steps.")
    n: int = flag(200, "Held-out problems.")
    limit: int = flag(256, "Training problems.")
    out: str = flag("runs/demo", "Directory of the results.")


def refuse_unused(args, given):
    """UserError: a flag was given that a run with these settings does not use."""
    cases = [
        ("@http" in args.model, "a server", "top_k thinking compile"),
        (isinstance(args, Inspect), "inspect", "limit compile"),
    ]
    if isinstance(args, Train):
        method, named = METHODS[args.method], f"method {args.method}"
        has_divergence = method.signal == "divergence"
        is_sampled = args.divergence == "sampled"
        drawing = "rollouts temperature top_p top_k batch_size compile"
        shape = "support tail clip loss_temperature"
        cases += [
            (method.writer == "reference", named, drawing),
            (not has_divergence, named, f"divergence {shape}"),
            (has_divergence and not is_sampled, named, "kl"),
            (method.sees != "rubric", named, "teacher_context"),
            (not method.sees and not args.kl, named, "teacher"),
            (is_sampled, "--divergence sampled", shape),
            (args.support == 0, "--support 0", "tail"),
            (args.stage != "reason", f"--stage {args.stage}", "teacher_context"),
        ]
    for applies, what, names in cases:
        for name in names.split():
            unused = applies and name in given
            require(not unused, f"{as_flag(name)}: {what} does not use it.")


def settle(kind, **given):
    """Settings of this kind with these flags given; where the data are the toy's, so are the
    defaults. UserError: a number is out of range, or a flag would change nothing."""
    for name, value in given.items():
        low, high = int(name in COUNTS), 1 if name == "top_p" else 10**9
        fits = isinstance(value, str) or low <= value <= high
        require(fits, f"{as_flag(name)} {value}: it has to be from {low} to {high}.")
    is_toy = given.get("data", given.get("model", "toy")) == "toy"  # data decide, else the model
    brought = {name: x for name, x in TOY_DEFAULTS.items() if is_toy and hasattr(kind, name)}
    args = kind(**brought | given)
    if args.model == "toy":
        args.model = f"{TOY}/base-{args.seed % 2}"  # there are two
    refuse_unused(args, given)
    args.given = given
    return args


def as_flag(name):
    """A setting's name as the command line has it."""
    return "--" + name.replace("_", "-")


def prompt_files(args, *names):
    """The texts of these prompt files. UserError: there is none of that name, it is no UTF-8, it
    lacks the question, or it has a placeholder that no row can fill."""
    texts = load_prompts(args.prompts)
    for name in names:
        path = f"{args.prompts}/{name}.txt"
        require(name in texts, f"{path}: there is no such prompt file.")
        require("\ufffd" not in texts[name], f"{path}: it is no UTF-8.")
        require("{question}" in texts[name], path + ": it has no {question}.")
        unknown = sorted(set(PLACEHOLDER.findall(texts[name])) - PLACEHOLDERS)
        require(not unknown, f"{path}: nothing fills {unknown}; a row has {PLACEHOLDERS}.")
    return [texts[name] for name in names]


def load_questions(args):
    """The rows of --data, --split and --limit, with the rubrics of --rubrics."""
    require(args.out != args.data, "--out: it is the file of --data; choose another.")
    rows = load_rows(args.data, args.split, args.limit, args.seed)
    return with_rubrics(rows, getattr(args, "rubrics", "data"))


# What a written line depends on.
SHAPING = "model writer seed thinking max_new_tokens temperature top_p top_k".split()


def say_next(args, command, **flags):
    """Say a command that comes next, for the data of this one and as that was asked."""
    kept = "data prompts seed thinking max_new_tokens".split() + list(flags)
    known = {"data": args.data} | args.given | flags
    words = [f"{as_flag(name)} {shlex.quote(str(x))}" for name, x in known.items() if name in kept]
    say("next: python rsd.py", command, *words)


def model_writer(args, model, tokenizer, completions=0):
    """The writer that samples from this model. The number of completions decides on compiling."""
    on, off = (context_ids(tokenizer, "@", {}, thinking) for thinking in (True, False))
    if args.thinking == "on" and on == off:
        say("warning: --thinking on changes nothing in this model's chat template")
    names = "original_max_position_embeddings", "max_position_embeddings"  # longrope's change
    longest = setting_of(model, *names) or math.inf
    flags = "max_new_tokens temperature top_p top_k batch_size".split()
    sampling = {name: getattr(args, name) for name in flags}
    sampling["stop"] = stop_ids(model, tokenizer)
    sample = functools.partial(sample_completions, model, **sampling)
    pays = torch.cuda.is_available() and completions > 250  # for a minute of compiling
    if {"auto": pays, "on": True, "off": False}[args.compile]:
        twin = make_teacher(model, "fixed")
        sample = functools.partial(sample_compiled, model, twin, **sampling)
        say("the sampler is compiled, once, in about a minute; in training it copies the weights")
    room = longest - args.max_new_tokens
    return ModelWriter(sample, tokenizer, room, args.thinking == "on", 2 * args.batch_size)


# -- generate, eval, judge


def write_lines(args, rows, name, columns, ask, rate, k=1):
    """What generate, eval and judge have in common: they let a model write what --out lacks, k
    times for each row, and report it. Columns of the row stand beside it. ask(writer, [(row,
    prompt)], tries) -> answers, with what was read of them under `name`; rate(that, row) ->
    scores."""
    (template,) = prompt_files(args, args.writer)
    if "@http" in args.model:
        writer = ServerWriter(args.model, vars(args))
    else:
        writer = model_writer(args, *load_model(args.model, half=True), k * len(rows))
    jobs = []
    for row, prompt in make_examples(rows, [template], writer):
        item = {column: row[column] for column in columns.split()}
        for number in range(k):
            jobs.append((item | {"sample": item.get("sample") or number}, (row, prompt)))
    origin = {name: getattr(args, name) for name in SHAPING}
    weights = Path(last_checkpoint(args.model) or args.model).glob("*.safetensors")
    origin["saved"] = max((file.stat().st_mtime for file in weights), default=0.0)
    origin["prompt"] = crc32(template.encode())
    torch.manual_seed(args.seed)
    tries = 3 if args.temperature > 0 else 1  # or it would only be repeated
    lines = remember(args.out, jobs, functools.partial(ask, writer, tries=tries), name, origin)
    return report(lines, name, {key_of(row): row for row in rows}, rate)


def report(lines, name, row_of, rate):
    """Print and return the mean of each figure of these lines over the questions, its standard
    error (NAME_se) and the number of questions that have it (NAME_n)."""
    lost = Counter(line["reason"] for line in lines if line[name] is None)
    if lost:
        say(name, "is missing for", lost.total(), "of", len(lines), "because:", dict(lost))
    samples = []
    for line in lines:
        if line["text"] is not None:  # it was not refused
            scores = rate(line[name], row_of[key_of(line)] | line)
            own = {"tokens": line["tokens"], "truncated": line["truncated"]}
            samples.append((key_of(line), scores | own))
    figures = evaluate(samples)
    # math_verify: without it, formulas are n/a
    summary = {"n": len(figures), "math_verify": bool(importlib.util.find_spec("math_verify"))}
    for figure in figures[0] if figures else ():
        mean, se, n = mean_se([f[figure] for f in figures])
        summary |= {figure: mean, figure + "_se": se, figure + "_n": n}
        shown = f"{mean:.3f} +- {se:.3f} (standard error, n {n})" if n else "n/a (README says why)"
        say(figure.ljust(18), shown)
    return summary


def cmd_generate(args):
    """Write a rubric for every question."""
    rows = load_questions(args)
    without = sum(not row["reference_answer"] for row in rows)
    if without:
        say(without, "rows have no reference; a prompt without {answer} serves them, too")
    ask = functools.partial(generate_rubrics, parse=parse_rubric)
    columns = "question reference_answer solution"
    summary = write_lines(args, rows, "rubric", columns, ask, score_rubric)
    say_next(args, "train", model="Qwen2.5-1.5B", rubrics=args.out)
    return summary


def cmd_eval(args):
    """Answer held-out questions and grade the answers."""
    rows = without_trained(load_questions(args), args.model)
    ask = functools.partial(write_until_read, read=lambda text, row: (text, ""), name="text")
    columns = "question reference_answer rubric"
    summary = write_lines(args, rows, "text", columns, ask, score, args.k)
    if not summary.get("rubric_score_n"):
        say_next(
            args, "judge", model="Qwen2.5-7B-Instruct", data=args.out or "ITS-OUT.jsonl",
            max_new_tokens=Judge.max_new_tokens,
        )
    return summary


def cmd_judge(args):
    """Ask a model which criteria of its rubric each answer of eval's --out meets."""
    columns = "question reference_answer response rubric sample"
    return write_lines(
        args, load_questions(args), "judge", columns, judge,
        rate=lambda met, row: {"rubric_score": rubric_score(row["rubric"], met)},
    )


# -- train


def training_writer(args, writer):
    """Step 1 of `train_step` for this method: examples -> episodes, written and graded."""
    method = METHODS[args.method]
    seen = "teacher_ids" if method.writer == "teacher" else "prompt_ids"

    def write(examples):
        episodes = examples
        if method.writer != "reference":
            episodes = model_writes(writer.sample, examples, args.rollouts, seen)
        for e in episodes:
            text = written_text(writer.tokenizer, getattr(e, seen), e.completion_ids)
            is_reason = args.stage == "reason"
            read = score(text, e.row) if is_reason else score_rubric(parse_rubric(text)[0], e.row)
            own = {"leak": bool(LEAK.search(text)), "truncated": not e.stopped}
            e.scores = own | {"length": len(e.completion_ids)} | read
        if method.reward:
            rewards = [e.scores[method.reward] for e in episodes]
            for e, gain in zip(episodes, group_advantages(rewards, args.rollouts)):
                e.advantage = gain
        return episodes

    return write


def set_up(args, state):
    """Student, tokenizer, teacher (None where none is asked) and optimizer of a run, as at its
    start or as the last checkpoint in --out has them."""
    student, tokenizer = load_model(args.model, half=args.lora_rank > 0)
    torch.manual_seed(args.seed)
    is_whole = not hasattr(student, "peft_config")
    require(is_whole, f"--model {args.model}: merge the adapter into its base; README says how.")
    if args.lora_rank:
        add_lora(student, args.lora_rank)
    needs_teacher = args.kl or METHODS[args.method].sees
    teacher = make_teacher(student, args.teacher) if needs_teacher else None
    if args.gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in student.parameters() if p.requires_grad]
    size = 4e-9 * sum(p.nbytes for p in trained)  # with two averages of AdamW's, and the teacher
    free = shutil.disk_usage(args.out).free / 1e9
    require(free > size, f"--out: a checkpoint takes {size:.2g} GB, and {free:.2g} are free.")
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    if state["metrics"]:
        student.load_state_dict(load_model(args.out)[0].state_dict())
        optimizer.load_state_dict(state["optimizer"])
        if state["teacher"]:
            teacher.load_state_dict(state["teacher"], strict=False)
    return student, tokenizer, teacher, optimizer


def training_loss(args):
    """`token_loss` with this method's signal and the flags' options."""
    signal = METHODS[args.method].signal
    return functools.partial(
        token_loss,
        signal=args.divergence if signal == "divergence" else signal,
        kl=args.kl,
        top_k=args.support,
        tail=args.tail,
        temperature=args.loss_temperature,
        clip=args.clip,
    )


def log_step(out, step, episodes, figures):
    """A step's line of metrics.jsonl; README says what each figure means and what is healthy."""
    metrics = {"step": step, **figures, **mean_scores([e.scores for e in episodes])}
    if metrics["truncated"] == 1:
        say_once("warning: every completion was cut off; raise --max-new-tokens")
    if metrics["loss"] == 0:
        say_once("warning: the loss is exactly 0, so that nothing is learned in such a step")
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    return metrics


def show_step(metrics, sample):
    """The figures of a step that people watch, in one line, and the beginning of a completion."""
    names = "step loss entropy length rubric_score accuracy seconds".split()
    shown = [f"{name} {metrics[name]:<6.4g}" for name in names if metrics.get(name) is not None]
    say(*shown, f"\n    {sample[:90]!r}")


def cmd_train(args):
    """Train a student, by default towards its rubric-guided teacher; --out gets checkpoints."""
    out = Path(args.out).resolve()
    method = METHODS[args.method]
    templates = prompt_files(args, args.student_context, args.teacher_context)
    needs_rubric = method.sees == "rubric" and args.stage == "reason"
    is_told = re.search("{(rubric|statements)", templates[1]) or not needs_rubric
    require(is_told, args.teacher_context + ".txt: a teacher of rsd needs a {rubric}.")
    rows = load_questions(args)
    kept = {"data and prompts": crc32(repr((templates, rows)).encode())}
    held, state = open_run(out, vars(args) | kept, args.resume)
    history = state["metrics"]
    start = len(history)
    student, tokenizer, teacher, optimizer = set_up(args, state)
    author = teacher if method.writer == "teacher" else student
    is_reference = method.writer == "reference"
    completions = 0 if is_reference else args.steps * args.batch * args.rollouts
    writer = model_writer(args, author, tokenizer, completions)
    needs = "solution" if is_reference else method.reward
    examples = [Episode(*e) for e in make_examples(rows, templates, writer, needs)]
    if is_reference:
        examples = reference_writes(tokenizer, examples, writer.room + args.max_new_tokens)
    for name in ("prompt_ids", "teacher_ids"):
        say("---", name, "of the first row ---\n" + tokenizer.decode(getattr(examples[0], name)))
    state["questions"] = sorted({question_hash(e.row) for e in examples})
    is_asked = args.kl or method.signal == "divergence"
    steps = train(
        student, teacher if is_asked else None, examples, training_writer(args, writer),
        training_loss(args), optimizer, args.steps, args.batch, args.lr, args.warmup, args.seed,
        start,
        ema_teacher=teacher if args.teacher == "ema" else None, token_budget=args.token_budget,
        chunk=192_000_000 if torch.cuda.is_available() else 24_000_000,
    )
    for step, episodes, figures in tqdm(steps, "train", initial=start, total=args.steps):
        history.append(log_step(out, step, episodes, figures))
        if step % 5 == 1:
            show_step(history[-1], tokenizer.decode(episodes[0].completion_ids))
        if step == args.steps or step % args.save_every == 0:
            save_checkpoint(out, state, student, teacher, optimizer, tokenizer)
    say(out, "has", len(history), "steps")
    is_all = Path(args.data).is_file() and not args.limit  # of it, eval would leave out every row
    data = "OTHER-QUESTIONS.jsonl" if is_all else args.data
    command = "eval" if args.stage == "reason" else "generate"
    say_next(args, command, model=args.out, data=data, out=f"{args.out}.jsonl")
    if command == "eval":
        say_next(args, "inspect", model=args.model, data=data, compare=args.out, run=args.out)
    return {name: sum(m[name] for m in history) for name in ("trained", "seconds")}


# -- inspect


def cmd_inspect(args):
    """Draw an HTML page: what the rubric does to each token of some rollouts; a run's curves."""
    out = Path(args.out)
    page_skeleton(out)  # before anything is sampled
    curves = read_jsonl(Path(args.run) / "metrics.jsonl") if args.run else []
    page = {"curves": curves, **inspect_rollouts(args)}
    write_page(out, page)
    say(out, "has", len(page["rollouts"]), "rollouts and", len(curves), "steps")
    return page


def inspect_rollouts(args):
    """The student's rollouts, and those of --compare, with their `token_credit`; and the text of
    every token that they name."""
    args.limit = args.n
    templates = prompt_files(args, "student", args.teacher_context)
    rows = load_questions(args)
    teacher, tokenizer = load_model(args.model, half=True)
    students = {"the student": teacher}
    if args.compare:
        students[args.compare], _ = load_model(args.compare, half=True)
    reader = model_writer(args, teacher, tokenizer)
    examples = [Episode(*e) for e in make_examples(rows, templates, reader, "rubric")]
    # If the only criterion is left out, its place is not empty.
    nothing = dict.fromkeys(PLACEHOLDER.findall(templates[1]), "-")
    torch.manual_seed(args.seed)
    rollouts, named = [], set()
    for name, student in students.items():
        sample = model_writer(args, student, tokenizer).sample
        for e in tqdm(model_writes(sample, examples), "credit"):
            ids, rubric, without = e.completion_ids, e.row["rubric"], []
            for criterion in rubric:
                others = [other for other in rubric if other is not criterion]
                fields = nothing | row_fields(e.row | {"rubric": others})
                without.append(reader.prompt(templates[1], fields))
            credit = token_credit(student, teacher, e.prompt_ids, e.teacher_ids, without, ids)
            rollout = {figure: values.tolist() for figure, values in credit.items()}
            rollout |= {"student": name, "question": e.row["question"]}
            rollouts.append(rollout | {"criteria": rubric, "tokens": ids})
            named.update(ids, *rollout["student_ids"], *rollout["teacher_ids"])
    rollouts.sort(key=lambda rollout: rollout["question"])  # the students side by side
    return {"rollouts": rollouts, "text": {i: tokenizer.decode([i]) for i in named}}


# -- demo


def run(line):
    """Run one command, shown as one would type it -> its figures."""
    say(f"\n$ python rsd.py {line}")
    args = parse_args(shlex.split(line))
    return COMMANDS[type(args)](args)


def cmd_demo(args):
    """Show the whole method on the toy, in minutes on a CPU."""
    out = shlex.quote(args.out)
    toy = f"--data toy --seed {args.seed}"
    rows = f"{toy} --limit {args.limit}"
    test = f"eval {toy} --limit {args.n} --max-new-tokens 80"
    results = {"student before": run(test), "teacher": run(f"{test} --writer rubric+answer")}
    run(f"generate {rows} --out {out}/rubrics.jsonl")
    training = run(
        f"train {rows} --max-new-tokens 80 --steps {args.steps} --resume "
        f"--rubrics {out}/rubrics.jsonl --out {out}/model"
    )
    results["student after"] = training | run(f"{test} --model {out}/model")
    page = f"{out}/credit.html"
    run(f"inspect {toy} --n 3 --run {out}/model --compare {out}/model --out {page}")
    (Path(args.out) / "results.json").write_text(json.dumps(results, indent=1))
    say(f"\n{args.n} held-out problems     accuracy          rubric score")
    for name, f in results.items():
        say(f"{name:24s}  {f['accuracy']:.3f} +- {f['accuracy_se']:.3f}    "
            f"{f['rubric_score']:.3f} +- {f['rubric_score_se']:.3f}")
    say(f"\nOpen {page}: which tokens did the rubrics move? Then see what a model of yours\n"
        "would do as its own teacher: python rsd.py eval --model Qwen2.5-1.5B --writer rubric")
    return results


# -- the command line

COMMANDS = {
    Demo: cmd_demo,
    Generate: cmd_generate,
    Train: cmd_train,
    Eval: cmd_eval,
    Judge: cmd_judge,
    Inspect: cmd_inspect,
}


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one sentence of ours."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_flags(parser, kind):
    """A flag for each field of these settings; a bool is a switch."""
    for part in reversed(kind.__mro__[:-1]):
        group = parser.add_argument_group(part.__name__.lower())
        for setting in fields(part):
            name, about = setting.name, setting.metadata
            if not about or name not in part.__annotations__:
                continue
            default = getattr(kind, name)
            options = {"type": type(default), "choices": about["choices"]}
            if default is False:
                options = {"action": "store_true"}
            text = about["help"] + f" (default: {default!r})"
            group.add_argument(as_flag(name), help=text, **options)


def parse_args(argv=None):
    """The settings that the command line says. UserError: it says what no command has."""
    parser = Parser(prog="rsd.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(metavar="command", required=True)
    for kind, run_it in COMMANDS.items():
        command = commands.add_parser(
            kind.__name__.lower(), help=run_it.__doc__, description=run_it.__doc__,
            epilog="example: " + kind.__doc__, argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        command.set_defaults(kind=kind)
        add_flags(command, kind)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    kind = given.pop("kind")
    if unknown:
        flags = [as_flag(f.name) for f in fields(kind)]
        close = difflib.get_close_matches(unknown[0], flags, cutoff=0.75)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"{unknown[0]}: {kind.__name__.lower()} has no such flag{hint}")
    return settle(kind, **given)


def main(argv=None):
    """Run one command -> its exit code. A user's mistake is one sentence on stderr, and 2."""
    try:
        args = parse_args(argv)
        COMMANDS[type(args)](args)
        return 0
    except KeyboardInterrupt:
        print("rsd.py: interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        message = (
            f"{error!s:.100}; lower --batch-size, --token-budget or --max-new-tokens, or take "
            "--gradient-checkpointing or --lora-rank 64."
        )
    except ImportError as error:
        message = f"{error}; pip install {error.name}"
    except (UserError, OSError) as error:
        message = str(error)
    except Exception as error:  # what nobody foresaw
        if "RSD_TRACEBACK" in os.environ:
            raise
        message = f"{type(error).__name__}: {error} (RSD_TRACEBACK=1 shows where)"
    print(f"rsd.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where the terminal lacks a letter
    sys.exit(main())
