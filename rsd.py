"""Rubric-Conditioned Self-Distillation (RSD): rsd.py demo | generate | train | eval | inspect.
RSD learns from rubrics, weighted criteria that a good answer meets. One network plays two parts:
  1. the student reads the bare question x and samples a completion y ~ p_S(.|x)
  2. the teacher, the same network with the rubric r in its context, re-scores every token of y
  3. at every position t of y the two next-token distributions are compared:
         loss = 1/N * sum over t of D( p_T(.|x, r, y_<t) || p_S(.|x, y_<t) )
  4. the gradient flows through the student only; N counts the completion tokens of the whole step
  5. after training the student needs no rubric
Sections 1 to 4 are the method; with 5 you can train. Glossary, code -> paper (arXiv 2606.19327):
question x, reference_answer y*, solution z, rubric r = {c_1..c_K}, completion y^, student p_S,
teacher p_T. B sequences, T tokens of one, N completion tokens in all, V vocabulary, H width."""
from __future__ import annotations
import argparse, copy, functools, hashlib, itertools, json, math, os, random, re, shutil, sys, time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import InferenceClient
from torch.distributed import all_reduce, fsdp
from torch.distributed.checkpoint import state_dict as states
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

HERE = Path(__file__).resolve().parent
RANK, RANKS = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's

def everyones(x) -> list:
    """x of every process that torchrun started, in order of rank; each has to call it."""
    parts = [x] * RANKS
    if RANKS > 1: torch.distributed.all_gather_object(parts, x)
    return parts

class UserError(Exception):
    """A mistake that the user can mend: the command line prints it as one sentence and exits 2."""

def check(ok, message: str) -> None:
    """UserError(message) unless ok."""
    if not ok: raise UserError(message)
# ---- 1. Two contexts: what the student sees, what the teacher sees -------------------------------
PLACEHOLDER = re.compile(r"\{(\w+)\}")
MARK = "\ufdd0"  # a code point that Unicode keeps for a program's own use

@dataclass
class Episode:
    """One row on its way from sampling to the update. Token ids only: text is never re-encoded."""
    row: dict
    prompt_ids: list[int]  # what the student sees
    teacher_ids: list[int]  # what the teacher sees in its place
    completion_ids: list[int] = ()  # the first stop token included
    stopped: bool = False  # False: cut off at the token limit
    advantage: float = 1.0  # for the signal "advantage": 1 in SFT, (r - mean) / std in GRPO
    train_from: int = 0  # completion tokens before this one carry no loss

def load_prompts(folder) -> dict[str, str]:
    """Every FOLDER/NAME.txt as {NAME: text}."""
    return {p.stem: p.read_text(encoding="utf-8").strip() for p in Path(folder).glob("*.txt")}

def row_fields(row: dict) -> dict[str, str]:
    """What one row can put into a prompt file's placeholders; parts that it lacks are left out."""
    rubric = row.get("rubric") or []
    lines = [f"- {c['title']}{': ' if c['title'] else ''}{c['description']} ({points(c):g})"
             for c in rubric]
    fields = {**row, "answer": row.get("reference_answer"), "rubric": "\n".join(lines),
              "rubric_json": rubric and json.dumps([
                  {k: c[k] for k in NAMES} for c in rubric], ensure_ascii=False),
              "statements": "\n".join(f"- {c['description']}" for c in rubric),
              "fence": hashlib.sha256(row.get("response", "").encode()).hexdigest()[:16]}
    return {name: text for name, text in fields.items() if text and isinstance(text, str)}

def plain(tokenizer, text: str) -> str:
    """Data as plain text: MARK cuts the names of control tokens in two, so that none is one."""
    names = sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True)
    pattern, text = "|".join(map(re.escape, names)) or "$^", text.replace(MARK, "\ufffd")
    return re.sub(pattern, lambda m: m[0][0] + MARK + m[0][1:], text)

def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, piece by piece between the MARKs of plain()."""
    return [t for piece in text.split(MARK) if piece
            for t in tokenizer.encode(piece, add_special_tokens=False)]

def context_ids(tokenizer, template: str, fields: dict[str, str], thinking=False) -> list[int]:
    """One prompt file and one row's fields -> ids [P] of a chat prompt, or for a server, which has
    no tokenizer here, one text. Braces, backslashes, $ and "<|im_end|>" in data stay plain text
    (for a server as "< |im_end|>"). KeyError: a placeholder that the row cannot fill."""
    safe = lambda x: plain(tokenizer, x) if tokenizer else re.sub(r"<(?=\S{,40}>)", "< ", x)
    message = PLACEHOLDER.sub(lambda m: safe(fields[m[1]]), template)
    return encode(tokenizer, tokenizer.apply_chat_template([{"role": "user", "content": message}],
                  tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
                  ) if tokenizer else [message]

def turn_end(tokenizer) -> int:
    """The token with which the chat template ends an assistant's turn, else the tokenizer's eos."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "@@"}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("@@")[2]
    first = tokenizer.encode(after, add_special_tokens=False)[:1]
    return first[0] if set(first) & set(tokenizer.all_special_ids) else tokenizer.eos_token_id

def stop_ids(model, tokenizer) -> set[int]:
    """All tokens that end a completion (Qwen has two): generation config, tokenizer, chat."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {*own, tokenizer.eos_token_id, turn_end(tokenizer)} - {None}
# ---- 2. Rubrics: read what a model wrote, write new ones -----------------------------------------
NAMES = {"title": ["title"], "description": ["description", "criterion", "criteria", "rubric_item"],
         "weight": ["weight", "points", "score"]}
AVOIDS = re.compile(r"\b(avoid|refrain|(warn|caution)s? against|(should|must)(n't| not)|"
                    r"does(n't| not) (\w+ly )?(overlook|neglect|ignor|omit|confus|mis|incorrect|"
                    r"fail|forget|impl))", re.I)
WORD_WEIGHT = {"essential": 5, "important": 3, "optional": 1, "pitfall": -1}
LATEX = (  # commands whose first letter JSON would take for an escape
    r"([bfr][a-zA-Z]+|n(abla|e(?![).])|eq|eg|earrow|[gl]eq|mid|o(limits|number|t|tin)|u)|t(ag|anh?"
    r"|au|binom|frac|ext\w*|h(erefore|eta|inspace)|ilde|imes|op?|riangle\w*|t))(?![a-zA-Z])")
ESCAPE = re.compile(rf'["\\/]|u[0-9a-fA-F]{{4}}|(?!{LATEX})[bfnrt]')  # what JSON means by \ as well

def read_criterion(item, need_title=False) -> dict:
    """One criterion from an object (any known field names) or a string ("Pitfall Criteria: ...": of
    weight 1 without a known first word). ValueError says what is missing."""
    if isinstance(item, str):
        m = re.match(rf"(?i)\s*({'|'.join(WORD_WEIGHT)})\b[^:]*:", item)
        item = {"title": m[1], "description": item[m.end():], "weight": WORD_WEIGHT[m[1].lower()]
                } if m else {"description": item, "weight": 1}
    if not isinstance(item, dict):
        raise ValueError(f"a criterion is an object or a string, not {json.dumps(item)[:40]}")
    got = {field: next((item[n] for n in names if item.get(n) is not None), None)
           for field, names in NAMES.items()}
    for field in ("title", "description"):
        got[field] = got[field].strip() if isinstance(got[field], str) else ""
        if not got[field] and (field == "description" or need_title):
            raise ValueError(f"a criterion has no {field}")
    if not re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", str(got["weight"])):
        raise ValueError("a criterion has no numeric weight")
    got["weight"] = int(w) if (w := float(got["weight"])).is_integer() else w
    return got | ({"check": item["check"]} if isinstance(item.get("check"), str) else {})

def points(c: dict) -> float:
    """What meeting it is worth: below 0 for a fault (negative weight, or the title Pitfall), unless
    it is worded as the avoidance of one ("must not ..."). So the sign is the polarity."""
    fault = c["weight"] < 0 or c["title"].lower().startswith("pitfall")
    return abs(c["weight"]) * (-1 if fault and not AVOIDS.search(c["description"]) else 1)

def parse_rubric(text: str, *_) -> tuple[list[dict] | None, str]:
    r"""Whatever a model wrote -> (criteria, "") or (None, why not). Thinking is dropped; the array
    with most complete criteria (title, description, numeric weight) is read object by object, so
    what is cut off or broken costs only itself; LaTeX backslashes are mended. Nothing is guessed.
    >>> parse_rubric('<think>hm</think>[{"title": "Law", "description": "Uses \\nu", "weight": 2}')
    ([{'title': 'Law', 'description': 'Uses \\nu', 'weight': 2}], '')
    """
    if "<think>" in (text := text.rpartition("</think>")[2]): return None, "unfinished thinking"
    mended = lambda m: m[0] if ESCAPE.match(text, m.start(1)) else "\\\\" + m[1]
    text, decoder = re.sub(r"\\(.)", mended, text, flags=re.S), json.JSONDecoder(strict=False)
    best, why = [], "no JSON array"
    for start in [m.start() for m in re.finditer(r"\[\s*\{", text)][::-1] or [0]:
        found, at, closed = [], start, None
        while not closed and (opening := re.compile(r'\{\s*"').search(text, at)):
            try:
                item, at = decoder.raw_decode(text, opening.start())
                found.append(read_criterion(item, need_title=True))
            except ValueError as error:  # cut off, broken, or a field is missing: go on behind it
                at = max(at, opening.end())
                why = "broken JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            closed = re.match(r"\s*,?\s*\]", text[at:])
        if found and not closed and len(text[:start].split()) > 60:
            return None, "unfinished thinking"  # long prose, then a draft that breaks off
        best = max(best, found, key=len)  # of several arrays the fullest, then the last
    return (best, "") if best else (None, why)

def generate(model, tokenizer, episodes, name="rubric", read=parse_rubric, tries=3, **sampling):
    """One rubric, or what else `read` finds in the text, per episode -> [{"text", "tokens",
    "truncated", name: what was read, or None, "reason", "tries"}], after at most `tries` draws."""
    results, todo = [{}] * len(episodes), range(len(episodes))
    for attempt in range(1, tries + 1):
        for i, e in zip(todo, write_completions(
                "student", model, tokenizer, [episodes[i] for i in todo], **sampling)):
            text = tokenizer.decode(e.completion_ids, skip_special_tokens=True) if tokenizer else \
                "".join(e.completion_ids)
            value, reason = read(text, e.row) if read else (text, "")
            results[i] = {"text": text, "tokens": len(e.completion_ids), "reason": reason,
                          "truncated": float(not e.stopped), name: value, "tries": attempt}
        todo = [i for i in todo if results[i][name] is None]
    return results
# ---- 3. Sampling: prompt ids in, completion ids out ----------------------------------------------
@torch.no_grad()
def sample_completions(model, prompts: list[list[int]], stop: set[int], max_new_tokens=512,
                       temperature=1.0, top_p=1.0, top_k=0, batch_size=64):
    """B prompts of ids -> B pairs (completion ids [T_b], stopped), in order. A completion ends with
    its first stop token, which is part of it; without one it has max_new_tokens ids. temperature 0:
    greedy. A batch ends when three quarters of its rows have; the others go on in a later one. The
    model's own defaults (repetition penalty ...) are set aside. Each rank samples its share."""
    how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    config = GenerationConfig(eos_token_id=sorted(stop), pad_token_id=min(stop),
                              **how if temperature > 0 else {})
    stops, device = torch.tensor(sorted(stop), device=model.device), model.device
    def mostly_done(out, _):
        return (torch.isin(out[:, width:], stops).any(1).float().mean() >= 0.75).expand(len(out))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done, todo = {}, {i: [] for i in order[RANK::RANKS]}  # row -> its completion so far
    model = copy.copy(model.eval())  # itself, but for these defaults
    model.generation_config = GenerationConfig()
    while todo:
        rows = list(todo)[:batch_size]
        config.max_new_tokens = max_new_tokens - min(len(todo[i]) for i in rows)
        seqs = [prompts[i] + todo[i] for i in rows]
        width = max(map(len, seqs))
        ids = torch.tensor([[0] * (width - len(s)) + s for s in seqs], device=device)
        mask = (torch.arange(width) >= torch.tensor([[width - len(s)] for s in seqs])).long()
        with torch.autocast("cuda", torch.bfloat16, device.type == "cuda"):
            out = model.generate(input_ids=ids, attention_mask=mask.to(device),
                                 generation_config=config, stopping_criteria=[mostly_done])
        for i, new in zip(rows, out[:, width:].tolist()):
            tokens = (todo.pop(i) + new)[:max_new_tokens]
            end = next((k + 1 for k, t in enumerate(tokens) if t in stop), None)
            if end or len(tokens) == max_new_tokens: done[i] = (tokens[:end], end is not None)
            else: todo[i] = tokens
    return [row for _, row in sorted((i, r) for part in everyones(done) for i, r in part.items())]

def ask(server: str, prompts: list[list[str]], batch_size=64, max_new_tokens=512, temperature=1.0,
        top_p=1.0, tries=8, timeout=600.0, **_) -> list[tuple[list[str], bool]]:
    """The same of NAME@URL, an OpenAI-compatible server (key: $OPENAI_API_KEY), batch_size requests
    at a time. A prompt is one text; a completion its text, then "" for each further token. What may
    pass is tried again after 1, 2, 4 ... 64 s, else UserError. top_k is not in the protocol."""
    name, _, url = server.partition("@http")
    key = os.environ.get("OPENAI_API_KEY") or "none"  # or the hub's own token would be sent
    client = InferenceClient(base_url="http" + url, api_key=key, timeout=timeout)
    how = dict(model=name, max_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    def one(prompt):
        for attempt in range(1, tries + 1):
            try:
                got = client.chat_completion([{"role": "user", "content": prompt[0]}], **how)
                text, ended = got.choices[0].message.content, got.choices[0].finish_reason
                length = got.usage.completion_tokens if got.usage else 1
                return [text or ""] + [""] * (length - 1), ended != "length"
            except Exception as error:  # of the connection, the server, its JSON: many kinds
                code = getattr(getattr(error, "response", None), "status_code", 500)
                again = (code in (408, 429) or code >= 500) and "HF_HUB_OFFLINE" not in str(error)
                check(again and attempt < tries, f"--model {name}: try {attempt} of {tries} failed "
                      f"({str(error)!r:.200}) for the prompt {prompt[0][:80]!r}.")
                time.sleep(2 ** (attempt - 1) * random.uniform(0.5, 1))
    return thread_map(one, prompts, max_workers=batch_size, desc=name, leave=False)
# ---- 4. Re-scoring and the per-token loss --------------------------------------------------------
def rescore(model, contexts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """The hidden states [N, H] that predict each completion token, sequence after sequence (logits:
    logits_of). Padding is on the right, where a causal model never looks: it needs no mask."""
    seqs = [p + c[:-1] for p, c in zip(contexts, completions)]  # the last token is never read
    width = max(map(len, seqs))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in seqs], device=model.device)
    for layer in (m for m in model.modules() if getattr(m, "gradient_checkpointing", False)):
        layer.training = torch.is_grad_enabled()  # what checkpointing asks for; dropout stays off
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, H)
    row = [b for b, c in enumerate(completions) for _ in c]
    col = [len(p) - 1 + t for p, c in zip(contexts, completions) for t in range(len(c))]
    return hidden[row, col]

def soft_cap(model, logits: torch.Tensor) -> torch.Tensor:
    """Gemma's bound on its logits, cap * tanh(logits / cap); others' as they are."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits

def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """The model's head on hidden states: [N, H] -> [N, V], soft cap included."""
    head = model.get_output_embeddings()
    return soft_cap(model, F.linear(hidden.to(head.weight.dtype), head.weight, head.bias))

def divergence(student: torch.Tensor, teacher: torch.Tensor, beta=0.0, top_k=0, tail=False,
               temperature=1.0, clip="none", clip_at=0.05, stats: Counter | None = None):
    """D(teacher, student) per token: logits or log-probs [N, V] twice -> [N], in float32. beta 0:
    forward KL(T||S). 1: reverse KL(S||T). Between: beta*KL(T||m) + (1-beta)*KL(S||m) with m =
    beta*T + (1-beta)*S; mind the jump, that goes to 0 towards both ends. top_k > 0: the teacher's
    top_k tokens alone, renormalised; with tail, one bucket more holds the rest of the mass. clip
    "entry" caps every vocabulary entry at clip_at before the sum, as the public code does: it can
    turn negative and invert the training; "token" caps the sum. stats grows by sums: "divergence"
    before clipping, "clipped" fraction.
    >>> p, q = torch.tensor([[.9, .1]]).log(), torch.tensor([[.1, .9]]).log()
    >>> [round(divergence(q, p, clip=c).item(), 2) for c in ("none", "entry", "token")]
    [1.76, -0.17, 0.05]
    """
    s, t = (x.float() if temperature == 1 else x.float() / temperature for x in (student, teacher))
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    if 0 < top_k < s.shape[-1]:
        index = t.topk(top_k, dim=-1).indices
        kept = lambda x: x.gather(-1, index)  # [N, V] -> [N, top_k]; with the tail one more
        rest = lambda x: x.scatter(-1, index, -math.inf).logsumexp(-1, True)
        s, t = (torch.cat([kept(x), rest(x)], -1) if tail else kept(x).log_softmax(-1)
                for x in (s, t))
    def kl(p, q):  # entries of KL(p||q), with - p + q, which sums to 0: so none is negative, and
        mass = p.exp()  # where p = q both value and gradient are exactly 0 in float32
        return mass * (p - q) - (mass - q.exp()) if clip != "entry" else mass * (p - q)
    if beta in (0, 1): terms = kl(s, t) if beta else kl(t, s)
    else:  # log m, exact where s = t and finite however far they are apart
        gap = torch.expm1(-(s - t).abs())
        m = torch.where(s > t, s + torch.log1p(beta * gap), t + torch.log1p((1 - beta) * gap))
        terms = beta * kl(t, m) + (1 - beta) * kl(s, m)
    if clip != "entry": terms = terms.sum(-1, keepdim=True)
    if stats is not None: stats.update(divergence=terms.sum().item(), clipped=0 if clip == "none"
                                       else (terms > clip_at).float().mean(-1).sum().item())
    return terms.clamp(max=math.inf if clip == "none" else clip_at).sum(-1)

def token_loss(signal: str, student, teacher, ids, advantage, kl=0.0, **options) -> torch.Tensor:
    """The per-token signal: logits [N, V] of student and teacher, ids [N], advantage [N] -> [N].
    forward, reverse, jsd: divergence(**options). sampled: policy gradient, advantage log p_T -
    log p_S. advantage: policy gradient with that one (1: SFT's cross-entropy), plus kl times the
    reverse KL to the teacher. Strictly on policy: no importance ratio, so nothing to clip."""
    if signal in BETA: return divergence(student, teacher, **{"beta": BETA[signal]} | options)
    logp = student.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    if signal == "sampled":
        target = teacher.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        advantage = (target - logp).detach()
    return -advantage * logp + (kl * divergence(student, teacher, beta=1.0) if kl else 0.0)

@torch.no_grad()
def backward_in_chunks(model, hidden, teacher, seen, loss_of, denominator: float, stats: Counter,
                       chunk=24_000_000, part=1_000_000) -> None:
    """Backward of sum(loss_of(...)) / denominator without ever holding [N, V] logits. hidden [N, H]
    with its graph, the teacher's `seen` [N, H] or None; loss_of(student's logits [n, V], teacher's
    or None, rows: slice) -> [n]. Both heads run on `chunk` logits at a time, the loss on `part` of
    them, which a CPU's cache holds. Its gradient takes the logits' place and goes by hand into the
    head's: autograd would build a second matrix of that size per chunk. Last comes one backward
    through the body. stats grows by sums of "loss" and "entropy" (nats)."""
    head, low = model.get_output_embeddings(), torch.get_autocast_dtype("cuda")
    weight, grad = head.weight, torch.zeros_like(hidden)
    if torch.is_autocast_enabled("cuda"): weight = weight.to(low)  # once, not in every chunk
    if hidden.is_cuda: chunk = part = 4 * chunk
    for p in {*model.get_input_embeddings().parameters(), *head.parameters()}:
        if p.requires_grad and p.grad is None: p.grad = torch.zeros_like(p)  # some rows are added
    many, few = (max(1, size // len(weight)) for size in (chunk, part))
    for start in range(0, len(hidden), many):
        h = hidden[start:start + many].to(weight.dtype)
        logits = F.linear(h, weight, head.bias)
        target = None if seen is None else logits_of(teacher, seen[start:start + many])
        for i in range(0, len(logits), few):
            leaf = logits[i:i + few].detach().requires_grad_()
            with torch.enable_grad():
                z = soft_cap(model, leaf)
                losses = loss_of(z, None if seen is None else target[i:i + few],
                                 slice(start + i, start + i + len(leaf)))
                (losses.sum() / denominator).backward()
            logp = z.float().log_softmax(-1).flatten()
            stats.update(loss=losses.sum().item(), entropy=-torch.vdot(logp.exp(), logp).item())
            logits[i:i + few] = leaf.grad
        grad[start:start + many] = logits @ weight
        if weight is head.weight and weight.requires_grad: weight.grad.addmm_(logits.T, h)
        elif head.weight.requires_grad: head.weight.grad += logits.T @ h
        if head.bias is not None and head.bias.requires_grad: head.bias.grad += logits.sum(0)
        del logits, target  # before the next ones are made
    hidden.backward(grad)
# ---- 5. Training: one pipeline, methods as choices -----------------------------------------------
METHODS = {       # who writes   teacher sees  signal      reward
    "rsd":         ("student",   "rubric",   "divergence", None),
    "opsd":        ("student",   "solution", "divergence", None),
    "grpo":        ("student",   "student",  "advantage",  "accuracy"),
    "grpo-rubric": ("student",   "student",  "advantage",  "rubric_score"),
    "sft":         ("reference", "student",  "advantage",  None)}
STAGES = {"reason": ("student", "rubric"),  # what the student and the teacher of rsd see; stage 1:
          "rubric": ("writer+answer", "writer+answer+rubric"),  # as in the public code
          "rubric-paper": ("writer", "writer+answer")}
BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # of the divergence; the other signal: sampled
LEAK = re.compile(r"\b(rubric|criteri(on|a)|reference (answer|solution)|guidance)\b", re.I)

def make_examples(tokenizer, rows, student, teacher, room=math.inf, thinking=False, needs=()):
    """Rows and two prompt files -> episodes without completions. A row that lacks a field or score
    (`needs` names more) or has a context over `room` tokens is left out, never cut, and counted."""
    examples, dropped = [], Counter()
    for row in tqdm(rows, desc="contexts", leave=False):
        fields = row_fields(row) | {k: "" for k, v in score("", row).items() if v is not None}
        if missing := sorted({*needs, *PLACEHOLDER.findall(student + teacher)} - fields.keys()):
            dropped[f"no {missing[0]}"] += 1
            continue
        pair = [context_ids(tokenizer, t, fields, thinking) for t in (student, teacher)]
        if max(map(len, pair)) > room: dropped["context too long for the model"] += 1
        else: examples.append(Episode(row, *pair))
    if dropped: print(f"left out {len(rows) - len(examples)} of {len(rows)} rows: {dict(dropped)}")
    check(examples, f"none of the {len(rows)} rows can be used: {dict(dropped)}.")
    return examples

def write_completions(writer: str, model, tokenizer, examples, rollouts=1, **sampling):
    """Choice 1, who writes: "student" samples `rollouts` each, "reference" takes the solution."""
    if writer == "student":
        examples = [e for e in examples for _ in range(rollouts)]
        prompts = [e.prompt_ids for e in examples]
        outputs = (sample_completions(model, prompts, stop_ids(model, tokenizer), **sampling)
                   if tokenizer else ask(model, prompts, **sampling))
    else:
        texts = [plain(tokenizer, e.row["solution"]) for e in examples]
        outputs = [(encode(tokenizer, text) + [turn_end(tokenizer)], True) for text in texts]
    return [replace(e, completion_ids=ids, stopped=end) for e, (ids, end) in zip(examples, outputs)]

def group_advantages(rewards: list[float], group: int, eps=1e-4) -> list[float]:
    """GRPO: (r - mean) / (std + eps) in each run of `group` rewards; equal ones give exactly 0."""
    r = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    centred = (r != r[:, :1]).any(1, keepdim=True) * (r - r.mean(1, True))
    return (centred / (r.std(1, correction=0, keepdim=True) + eps)).flatten().tolist()

def micro_batches(episodes: list[Episode], token_budget: int) -> list[list[Episode]]:
    """Episodes sorted by length, cut so that padded rows x width of a rank is within the budget."""
    width = lambda e: max(len(e.prompt_ids), len(e.teacher_ids)) + len(e.completion_ids)
    ranked, batches = sorted(episodes, key=width, reverse=True), []
    while ranked:  # the first one is the widest of its batch
        rows = max(1, token_budget // width(ranked[0])) * RANKS
        batches, ranked = [*batches, ranked[:rows]], ranked[rows:]
    return batches

@contextmanager
def timed(seconds: Counter, name: str):
    """Add the wall seconds of the block to seconds[name]; waits for a GPU's work."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available(): torch.cuda.synchronize()
    seconds[name] += time.perf_counter() - start

def accumulate(model, teacher, episodes, signal, token_budget=8192, kl=0.0, **options) -> Counter:
    """Re-score and backward, micro-batch by micro-batch -> loss, divergence, entropy, clipped per
    trained token, their number, seconds. One denominator, the trained tokens of all episodes: any
    split, over ranks too, gives the same gradient. (Autocast's cache would cut it; it is off.)"""
    total = sum(len(e.completion_ids) - e.train_from for e in episodes)
    stats, seconds = Counter(loss=0.0, divergence=0.0, entropy=0.0, clipped=0.0), Counter()
    for batch in micro_batches(episodes, token_budget):  # a rank without rows keeps in step
        batch = batch[RANK::RANKS] or [replace(e := batch[0], train_from=len(e.completion_ids))]
        completions = [e.completion_ids for e in batch]
        tokens = [(t, e.advantage, k >= e.train_from)
                  for e in batch for k, t in enumerate(e.completion_ids)]
        ids, advantage, keep = (torch.tensor(x, device=model.device) for x in zip(*tokens))
        ids, advantage = ids[keep], advantage[keep]
        with torch.autocast("cuda", torch.bfloat16, model.device.type == "cuda", False):
            with timed(seconds, "s_rescoring"), torch.no_grad():
                seen = rescore(teacher, [e.teacher_ids for e in batch], completions)[keep] \
                    if kl or signal != "advantage" else None
            loss_of = lambda student, target, rows: token_loss(
                signal, student, target, ids[rows], advantage[rows], kl, stats=stats, **options)
            with timed(seconds, "s_update"):
                hidden = rescore(model, [e.prompt_ids for e in batch], completions)[keep]
                backward_in_chunks(model, hidden, teacher, seen, loss_of, max(total, 1), stats)
    for p in model.parameters() if RANKS > 1 else ():
        if p.grad is not None and not hasattr(p, "full_tensor"): all_reduce(p.grad)
    mean = {k: sum(s[k] for s in got) / max(total, 1) for got in [everyones(stats)] for k in stats}
    return Counter(mean | {"trained": total} | seconds)

def make_teacher(model, kind: str):
    """fixed, ema: a frozen copy of the weights, in memory, fixed ones in bfloat16 on a GPU; live:
    the student itself. Of a LoRA only the adapters are copied: they begin at 0, the base model."""
    if kind == "live": return model
    teacher = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    for p in teacher.parameters() if kind == "fixed" and model.device.type == "cuda" else ():
        if p.requires_grad: p.data = p.data.bfloat16()  # no buffers: rotary angles need float32
    return teacher.requires_grad_(False)

def add_lora(model, rank: int, alpha: int, targets: str) -> None:
    """Freeze the model; float32 adapters on `targets` (names by comma, or all-linear) train."""
    from peft import LoraConfig  # optional; main says how to get it
    targets = targets if targets == "all-linear" else targets.split(",")
    names = {n.split(".")[-2] for n, p in model.base_model.named_parameters() if p.ndim == 2}
    check(targets == "all-linear" or names >= {*targets}, f"--lora-targets: choose of {names}.")
    model.requires_grad_(False).add_adapter(LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, task_type="CAUSAL_LM"))
    for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data

def shard(model, regather: bool) -> None:
    """FSDP2: cut the decoder layers' weights among the ranks; embeddings, norm, head stay whole. A
    layer is gathered for a forward pass and let go in the backward one, or (regather) at once."""
    layers = max((m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList)),
                 key=lambda m: sum(p.numel() for p in m.parameters()))
    half = torch.bfloat16 if model.device.type == "cuda" else None
    policy = fsdp.MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fsdp.fully_shard(layer, reshard_after_forward=regather, mp_policy=policy)
        layer.set_gradient_divide_factor(1.0)  # a sum: the denominator is that of all ranks
        layer.set_force_sum_reduction_for_comms(True)  # gloo knows no other way
    rest = {*model.base_model.parameters()} - {*layers.parameters()}
    fsdp.fully_shard(model.base_model, ignored_params=rest)  # frees summed gradients at once

@torch.no_grad()
def ema_update(teacher, model, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, parameter by parameter."""
    for t, s in zip(teacher.parameters(), model.parameters()):
        if s.requires_grad: t.lerp_(s.to(t.dtype), 1 - decay)

def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up, then constant, or cosine down to 0 at `steps`; step counts from 0."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    rate = peak * min(1.0, (step + 1) / max(1, warmup))
    return rate if schedule == "constant" else rate * 0.5 * (1 + math.cos(math.pi * done))

def optimizer_step(optimizer, lr: float, max_grad_norm: float) -> float:
    """Clip, step, clear -> the gradient norm before clipping; if it is not finite nothing moves."""
    parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norms = [p.grad.norm() for p in parameters]  # a sharded one's is made whole
    norm = torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).norm()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm, foreach=False)
    for group in optimizer.param_groups: group["lr"] = lr
    if norm.isfinite(): optimizer.step()
    optimizer.zero_grad()
    return norm.item()

def step_rows(items: list, step: int, batch: int, seed: int) -> list:
    """The items of one step: epoch after epoch, each in an order of its own; no state to save."""
    n = len(items)
    order = functools.cache(lambda epoch: random.Random(f"{seed} {epoch}").sample(items, n))
    return [order(k // n)[k % n] for k in range(step * batch, (step + 1) * batch)]

def save_checkpoint(out: Path, model, teacher, optimizer, tokenizer, settings, metrics) -> None:
    """Replace directory `out` by renames (open_run mends a crash); every rank has to call it."""
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=settings["shard"])
    trained = replace(whole, ignore_frozen_params=True)
    weights, moments = states.get_state_dict(model, optimizer, options=trained)
    taught = {} if teacher is model else states.get_model_state_dict(teacher, options=whole)
    if RANK: return
    new, old = out.with_name(out.name + ".rsd-new"), out.with_name(out.name + ".rsd-old")
    for rest in (new, old): shutil.rmtree(rest, ignore_errors=True)
    model.save_pretrained(new, state_dict=weights)  # of a LoRA, the adapters
    tokenizer.save_pretrained(new)
    torch.save({"step": len(metrics), "metrics": metrics, "optimizer": moments, "teacher": {
        n: x for n, x in taught.items() if n in moments["state"]}}, new / "trainer.pt")
    (new / "rsd.json").write_text(json.dumps(settings, indent=1))
    shutil.copy(out / "metrics.jsonl", new)
    out.rename(old)
    new.rename(out)
    shutil.rmtree(old)

def open_run(out: Path, settings: dict, resume: bool) -> dict:
    """The trainer state of the run in `out` that is to go on, or of step 0 where one may begin.
    UserError where `out` holds anything else: nothing is ever written over."""
    if RANK == 0 and (old := out.with_name(out.name + ".rsd-old")).exists() and not out.exists():
        old.rename(out)
    everyones("the others wait for that")
    if not out.exists() or out.is_dir() and {f.name for f in out.iterdir()} <= {"metrics.jsonl"}:
        return {"step": 0, "metrics": []}
    check((out / "trainer.pt").exists(), f"--out {out} is no run of rsd.py; choose another --out.")
    was, free = json.loads((out / "rsd.json").read_text()), ("steps", "save_every")
    changed = [f"{k} {was.get(k)!r} -> {v!r}" for k, v in settings.items()
               if k not in free and was.get(k) != v]
    check(not changed, f"--out {out} holds a run with other settings: {', '.join(changed)}.")
    check(resume, f"--out {out} holds this run already; add --resume, or choose another --out.")
    return torch.load(out / "trainer.pt", map_location="cpu", weights_only=True)
# ---- 6. Evaluation: one grader for rewards and for results ---------------------------------------
NUMBER = re.compile(r"([-+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?)"
                    r"(?:/(\d+(?:\.\d+)?))?(.*)", re.S)
SPELLINGS = [  # of numbers, units and letters -> a plain one, in this order
    (r"[\s$~]+", " "), ("[−–]", "-"), (r"^ ?10 ?\^ ?\{?([-+]?\d+)\}?", r"1e\1"),
    (r"(?<!\d)(?<!\d )\\[dt]?frac ?\{(-?[\d.]+)\} ?\{([\d.]+)\}(?! ?\d)", r"\1/\2"),
    (r"(?<=[\d.]) ?(?:\\times|\\cdot|[×x* ]) ?10 ?\^ ?\{?([-+]?\d+)\}?", r"e\1"),
    (r"\^? ?\{? ?\\circ\b ?\}?", "°"), (r" |\\(text|mathrm|textbf|mathbf)\b|\\[,;!]|\\(?=%)", "")]

def spell(text: str) -> str:
    """Numbers, units and letters in one plain spelling, without spaces and LaTeX's dress."""
    for pattern, plainer in SPELLINGS: text = re.sub(pattern, plainer, text)
    return text

def extract_answer(text: str) -> str:
    r"""The content of the last \boxed{}, nested braces included; without one, the last line."""
    _, boxed, rest = text.rpartition("\\boxed{")
    if not boxed: return (text.strip().splitlines() or [""])[-1].strip()
    depth = [*itertools.accumulate((c == "{") - (c == "}") for c in rest)]
    return rest[:depth.index(-1) if -1 in depth else None].strip()

def grade(answer: str, reference: str, tolerance=0.01, need_unit=True) -> bool:
    """Is the extracted answer the reference? A capital letter: that option. Numbers: within a
    relative tolerance, and in the reference's unit, which need_unit asks for. Other text: the same
    but for case, spaces, LaTeX's dress, or equal for math_verify, where that is installed.
    >>> grade("720 C", "720 C"), grade("720", "720 C"), grade("7.2e2 C", "720 C"), grade("(b)", "B")
    (True, False, True, True)
    """
    a, b = spell(answer), spell(reference)
    if re.fullmatch("[A-Z]", b):
        return bool(re.match(rf"(?i)\W*(option|choice)?\W*{b}($|[.,:)}}](?!\W*[A-Z]\b))", a))
    m, n = NUMBER.fullmatch(a), NUMBER.fullmatch(b)
    if m and n:
        x, y = (float(k[1].replace(",", "")) / (float(k[2] or 1) or math.nan) for k in (m, n))
        u, v = (re.sub(r"[{}.]", "", k[3]) for k in (m, n))  # units
        bare = not (u if v else re.match(r"[/\\^*:,\d-]|.*[+=]", u))  # 3:4 is no 3 with a unit
        return (u == v or bare and not (need_unit and v)) and abs(x - y) <= tolerance * abs(y)
    if a.strip("(){}.").lower() == b.strip("(){}.").lower(): return True
    with suppress(Exception):  # not installed, or no mathematics
        from math_verify import parse, verify  # which do not look at units
        return not (n and n[3]) and verify(*(parse(f"${t}$") for t in (reference, answer)))
    return False

def rubric_score(rubric: list[dict] | None, met: list[bool | None], rar=False) -> float | None:
    """Points of the criteria met over the positive points, in [0, 1] (HealthBench); rar (Rubrics as
    Rewards, explicit), or a rubric of faults only: the share of the weights that is earned, a
    fault's by its absence. None without a rubric, or without a verdict on each criterion."""
    if not rubric or not met or None in met or len(met) != len(rubric): return None
    worth = [points(c) for c in rubric]
    got = sum(w for w, m in zip(worth, met) if m)
    best, worst = (sum(w for w in worth if w * sign > 0) for sign in (1, -1))
    if rar or not best: return (got - worst) / (best - worst) if best > worst else None
    return min(1.0, max(0.0, got / best))

def score(text: str, row: dict) -> dict:
    """{"accuracy": 0/1, "rubric_score": 0..1}, each None where it takes a judge: for a reference of
    over 40 characters without \\boxed{}, and for criteria without a `check` to search for."""
    reference, rubric = row["reference_answer"] or "", row.get("own_rubric", row.get("rubric"))
    boxed = "\\boxed{" in reference
    right = grade(extract_answer(text), extract_answer(reference) if boxed else reference,
                  **row.get("grading", {}))
    met = [bool(re.search(c["check"], text)) if "check" in c else None for c in rubric or ()]
    return {"accuracy": float(right) if boxed or 0 < len(reference) <= 40 else None,
            "rubric_score": rubric_score(rubric, met)}

def score_rubric(rubric: list[dict] | None, row: dict) -> dict:
    """A generated rubric: valid, number of criteria; against exact ones recall and precision."""
    wanted = [c["description"] for c in row["own_rubric"] or () if "check" in c]
    hits = len({c["description"] for c in rubric or ()} & set(wanted))
    return {"valid": float(bool(rubric)), "criteria": len(rubric) if rubric else None,
            "recall": hits / len(wanted) if wanted else None,
            "precision": hits / len(rubric) if rubric and wanted else None}

def mean_se(values: list) -> tuple[float | None, float | None, int]:
    """Mean, standard error and number of the values that are not None."""
    x = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    se = x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0
    return (x.mean().item(), se, len(x)) if len(x) else (None, None, 0)

def read_verdicts(text: str, row: dict) -> tuple[list[bool] | None, str]:
    """A judge's last list of true and false, one for each criterion; or (None, why not)."""
    lists = re.findall(r"\[[\s,truefals]+\]", text.rpartition("</think>")[2].lower())
    met = [word == "true" for word in re.findall("true|false", lists[-1])] if lists else []
    return (met, "") if len(met) == len(row["rubric"]) else (None, "not a verdict for each one")

WRITES = {  # what a model can write: what of the row stands beside it; its reader; its scores
    "rubric": (("question", "reference_answer", "solution"), parse_rubric, score_rubric),
    "analysis": (("question", "reference_answer", "solution", "rubric"), None, lambda *_: {}),
    "text": (("question", "reference_answer", "rubric"), None, score),
    "judge": (("question", "response", "rubric"), read_verdicts, lambda met, row: {
        f"{k}_score": rubric_score(row["rubric"], met, k == "rar") for k in ("rubric", "rar")})}

def per_question(samples) -> dict[str, dict]:
    """(question, answer, scores), k times a question -> {question: mean of each score; with k > 1
    pass@m = 1 - C(k - right, m) / C(k, m), unbiased (arXiv 2107.03374), and majority@k}."""
    groups = {}
    for question, *sample in samples: groups.setdefault(question, []).append(sample)
    for question, group in groups.items():
        (answers, scores), k = zip(*group), len(group)
        groups[question] = own = {n: mean_se([s[n] for s in scores])[0] for n in scores[0]}
        if k == 1 or own.get("accuracy") is None: continue
        wrong, often = k - round(k * own["accuracy"]), Counter(answers).most_common(1)[0][0]
        for m in (2**i for i in range(1, k.bit_length())):
            own[f"pass@{m}"] = 1 - math.comb(wrong, m) / math.comb(k, m)
        own[f"majority@{k}"] = scores[answers.index(often)]["accuracy"]
    return groups

def report(figures: list[dict]) -> dict:
    """Print and return each figure's mean over questions, standard error (_se) and number (_n)."""
    summary = {"n": len(figures)}
    for key in {key: 0 for f in figures for key in f}:
        x, se, n = mean_se([f.get(key) for f in figures])
        summary |= {key: x, f"{key}_se": se, f"{key}_n": n}
        print(f"{key:18s}", f"{x:.3f} +- {se:.3f} (standard error, n {n}), 95 %: "
              f"{x - 1.96 * se:.3f} to {x + 1.96 * se:.3f}" if n else "n/a")
    return summary
# ---- 7. Seeing the credit: which tokens the rubric moves, and which criterion moves them ---------
@torch.no_grad()
def token_credit(model, teacher, prompt, context, without, completion, top=5) -> dict:
    """Ids in: the student's prompt, the teacher's context, the same without each of K criteria, a
    completion of T tokens. Out, in nats: gap [T] = log p_T - log p_S; divergence [T] = KL(T||S);
    credit [K, T] = log p_T less log p_T without criterion k; credit_divergence [K, T], of the KL;
    the likeliest student_ids, teacher_ids and their student_p, teacher_p [T, top]. K + 2 forward
    passes. Leave-one-out is what one adds to the others: two that say the same get about 0 each."""
    token, views = torch.tensor(completion, device=model.device)[:, None], [context, *without]
    student = logits_of(model, rescore(model, [prompt], [completion])).float().log_softmax(-1)
    said, apart, likeliest = [], [], [student.exp().topk(top)]
    for hidden in rescore(teacher, views, [completion] * len(views)).split(len(token)):
        logp = logits_of(teacher, hidden).float().log_softmax(-1)  # one [T, V] at a time
        if not said: likeliest.append(logp.exp().topk(top))
        said.append(logp.gather(1, token)[:, 0])
        apart.append(divergence(student, logp))
    return {"gap": said[0] - student.gather(1, token)[:, 0], "divergence": apart[0],
            "credit": torch.stack([said[0] - x for x in said])[1:],
            "credit_divergence": torch.stack([apart[0] - x for x in apart])[1:],
            **{f"{who}_{k}": x for who, most in zip(("student", "teacher"), likeliest)
               for k, x in zip(("p", "ids"), most)}}
# ---- 8. Models and data --------------------------------------------------------------------------
OWNERS = {"qwen": "Qwen", "llama": "meta-llama", "gemma": "google"}  # of bare hub names

def load_model(name: str, dtype=torch.float32, attn=None, **hub):
    """(model, tokenizer) of a directory or the hub, safetensors only; (name, None) of a server.
    hub: revision, trust_remote_code. UserError: not found, or a head that logits_of cannot do."""
    if re.search("@https?://", name): return name, None
    owner = next((o for family, o in OWNERS.items() if name.lower().startswith(family)), "")
    source = f"{owner}/{name}" if owner and not ("/" in name or Path(name).is_dir()) else name
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True,
                                                     attn_implementation=attn or None, **hub)
    except Exception as error:  # transformers, huggingface_hub and safetensors have many kinds
        raise UserError(f"--model {name}: looked for {source} here and on the hub, in vain "
                        f"({str(error)!r:.150}); pass --model DIR, a downloaded copy.") from error
    if tokenizer.chat_template is None:
        print(f"note: {name} has no chat template; used is the plain one, the prompt and 'Answer:'")
        tokenizer.chat_template = (HERE / "prompts" / "plain_chat.jinja").read_text()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, model.device.type == "cuda"):
        own = model(input_ids=torch.tensor([[1, 2, 3, 4]], device=model.device)).logits[0]
        ours = logits_of(model, rescore(model, [[1]], [[2, 3, 4, 0]]))
    check((own - ours).abs().max() <= 0.02 * own.abs().max(), f"--model {name}: the head of this "
          f"{model.config.model_type} is more than a matrix product and a soft cap: not supported.")
    return model, tokenizer

def read_rubric(value, weight=None) -> list[dict] | None:
    """Criteria in any known form -> a rubric or None. weight: of all. ValueError, re.error: bad."""
    value = (json.loads(value.strip() or "[]") if isinstance(value, str) else value) or []
    if not isinstance(value, list): raise ValueError("it is no list of criteria")
    rubric = [read_criterion({**item, "weight": weight} if weight else item) for item in value]
    for c in rubric: re.compile(c.get("check", ""))
    return rubric or None

def read_jsonl(path: Path, mend=False) -> list[dict]:
    """A JSON Lines file's objects; UserError names a line that is none (mend: but a last one)."""
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict): raise ValueError("it is no object")
            rows += [row] if row else []
        except ValueError as error:
            check(mend and rows and number == len(lines),
                  f"{path}, line {number}: no JSON object ({error}); mend it.")
    return rows

def remember(path, jobs: list[tuple], work, size: int, desc: str, **origin) -> list[dict]:
    """Of the different jobs (item, asked) the lines item | answer | origin; work([asked]): answers.
    What the JSON Lines file `path` holds is not asked again; UserError if it has another origin."""
    key = lambda line: json.dumps([line.get(k, 0) for k in jobs[0][0]])
    old = read_jsonl(path, mend=True) if (path := Path(path or os.devnull)).exists() else []
    check(len({*everyones(len(old))}) == 1 and all(origin.items() <= d.items() for d in old),
          f"--out {path} has other settings than {origin}, or differs by node; choose another.")
    done = {key(d): d for d in old}
    torch.manual_seed(torch.initial_seed() + len(done) * RANKS)  # not the old samples once more
    todo = [*{key(job[0]): job for job in jobs if key(job[0]) not in done}.values()]
    print(f"{len(todo)} of {len(jobs)} are still to do (others repeat, or are done)")
    path.parent.mkdir(parents=True, exist_ok=True)
    if old and RANK == 0:  # whole lines only, in one move
        lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in old)
        (new := Path(f"{path}.rsd-new")).write_text(lines, encoding="utf-8")
        new.replace(path)
    with open(path if RANK == 0 else os.devnull, "a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(todo), size), desc=desc, disable=not todo or RANK > 0):
            batch = todo[start:start + size]
            for (item, _), answer in zip(batch, work([a for _, a in batch])):
                done[key(item)] = line = item | answer | origin
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    return [*{key(item): done[key(item)] for item, _ in jobs}.values()]

@functools.cache
def packaged(name: str):
    """What stands in prompts/NAME.json."""
    return json.loads((HERE / "prompts" / f"{name}.json").read_text(encoding="utf-8"))

def read_table(data: str, split: str, limit: int) -> list[dict]:
    """The raw rows of a .jsonl, .json or .parquet file, or of a data set of the hub: its name in
    prompts/data.json, or OWNER/NAME, with :CONFIG or :FILE. No more than `limit` are fetched."""
    hub, _, part = (spec := packaged("data").get(data, {})).get("hub", data).partition(":")
    kind = "" if part else (re.findall(r"\.(jsonl?|parquet)$", data) or [""])[0]
    check(kind or "/" in hub, f"--data {data}: unknown; give a .jsonl, .json or .parquet file, "
          f"a hub id (owner/name, owner/name:config), toy, {', '.join([*packaged('data')][1:])}.")
    check(not kind or Path(data).is_file(), f"{data}: there is no such file.")
    from datasets import Dataset, load_dataset, logging
    logging.set_verbosity(logging.CRITICAL)  # what it would say is said below
    if kind == "jsonl": return read_jsonl(Path(data))[:limit or None]
    try:
        table = (Dataset.from_parquet(data) if kind == "parquet" else
                 json.loads(Path(data).read_text(encoding="utf-8")) if kind else
                 load_dataset(hub, **{"data_files" if "." in part else "name": part or None},
                              split=spec.get(split, split), streaming=limit > 0))
        return [*itertools.islice(table, limit or None)]
    except Exception as error:  # json, pyarrow, datasets and the hub each have their own
        raise UserError(f"{data}: looked for {hub} and could not read it ({str(error)!r:.150}); a "
                        "file will do; where its page asks for consent: hf auth login.") from error

def as_text(cell):
    """A cell as text: of chat messages the last user's, of a list all; of an object, each part."""
    if isinstance(cell, dict): return {k: as_text(v) for k, v in cell.items()}
    if not isinstance(cell, list): return "" if cell is None else str(cell).strip()
    said = [m["content"] for m in cell if isinstance(m, dict) and m.get("role") == "user"]
    return said[-1] if said else "\n\n".join(map(str, cell))

def load_rows(data: str, split: str, limit=0, seed=0) -> list[dict]:
    """Rows {question, reference_answer, solution, analysis, response, rubric} of what --data takes.
    UserError names the source and the row (counted from 1), or the columns that there are."""
    if data in ("toy", "toy-noisy"):
        return toy_rows(split, limit or (2000 if split == "train" else 200), seed, data != "toy")
    spec = packaged("data")["any"] | packaged("data").get(data, {})
    table, columns, rows = read_table(data, split, limit), spec["columns"] | spec, []
    check(table and all(isinstance(r, dict) for r in table), f"{data} has no rows of objects.")
    for number, raw in enumerate(table, 1):
        try:
            cells = dict.fromkeys(("solution", "analysis", "text", "sample"), "") | as_text(raw)
            if raw.get("text") == "": cells["text"] = "(no answer)"  # which a judge grades, too
            row = {k: columns[k].format_map(cells) for k in spec["columns"]}
            row["rubric"] = read_rubric(next((raw[c] for c in spec["rubric"] if raw.get(c)), None),
                                        spec.get("weight"))
            if "options" in spec:  # in an order of the question's own; its letter is the answer
                options = [option.format_map(cells) for option in spec["options"]]
                right = options[int(spec["right"].format_map(cells))]
                random.Random(row["question"]).shuffle(options)
                row["reference_answer"] = "ABCDEFGH"[options.index(right)]
                row["question"] += "\n" + "".join(map("\n{}. {}".format, "ABCDEFGH", options))
        except (ValueError, re.error, LookupError, TypeError) as error:
            raise UserError(f"{data}, row {number}: cannot be read ({error!r:.150}); its columns "
                            f"are {sorted(raw)}.") from error
        check(row["question"], f"{data}, row {number}: the question is empty.")
        rows.append(row | {"grading": spec.get("grading", {})})
    if split == "test" and spec.get("overlap"):
        seen, n = {row["question"] for row in load_rows(data, "train")}, len(rows)
        rows = [row for row in rows if row["question"] not in seen]
        print(f"{data}: left out {n - len(rows)} of {n} rows that its train split has as well")
    return rows

def with_rubrics(rows: list[dict], source: str, folder, seed=0) -> list[dict]:
    """Rows with the rubric from `source`: data, none (no teacher sees it), generate's .jsonl; for
    ablation generic (folder's), random (another question's), noisy (each second criterion
    another's), reduced (half). The row's own, own_rubric, alone grades."""
    rng, n = random.Random(f"rubrics {seed}"), len(rows)
    own = [r["rubric"] or [] for r in rows]
    others = [own[(i + rng.randrange(1, max(2, n))) % n] for i in range(n)]
    kinds = {"data": lambda: own, "none": lambda: own, "random": lambda: others,
             "generic": lambda: [read_rubric((Path(folder) / "generic.json").read_text())] * n,
             "noisy": lambda: [[rng.choice(o) if o and k % 2 else c for k, c in enumerate(r, i)]
                               for i, (r, o) in enumerate(zip(own, others))],
             "reduced": lambda: [rng.sample(r, (len(r) + 1) // 2) for r in own]}
    if source.endswith(".jsonl") and Path(source).is_file():
        found = {r["question"]: r for r in load_rows(source, "")}
        rows = [r | {"analysis": found.get(r["question"], {}).get("analysis")} for r in rows]
        kinds[source] = lambda: [found.get(r["question"], {}).get("rubric") for r in rows]
    check(source in kinds, f"--rubrics {source}: no such file, and none of {', '.join(kinds)}.")
    return [row | {"rubric": rubric or None, "own_rubric": row["rubric"]}
            for row, rubric in zip(rows, kinds[source]())]
# ---- 9. The toy world: a model that can do right when told how, and does not by default ----------
HABITS = ("formula", "conversion", "unit")
world = lambda: packaged("toy/world")  # sentences, units and words; the model's config is beside it

def toy_problem(rng: random.Random) -> dict:
    """A random problem as a row, its parts under "toy"; every criterion has an exact check."""
    pick = lambda kind: rng.choice(world()[kind])
    p = pick("families") | {"a": rng.randint(2, 9), "b": rng.randint(2, 9)}
    text = f"{p['sentence']} {pick('asks')}".format(x=pick("things"), **p)
    p["n"] = p["b"] * p["factor"]
    rubric = [c | {"description": c["description"].format(**p),
                   "check": re.escape(c["check"].format(**p))} for c in world()["rubric"]]
    return {"question": text[0].upper() + text[1:], "toy": p, "rubric": rubric, "solution":
            toy_solution(p, HABITS), "reference_answer": f"{p['a'] * p['n']} {p['unit']}"}

def toy_solution(p: dict, habits, slip=False) -> str:
    """The solution with just these habits; without the conversion, or with a slip, it is wrong."""
    steps = [step.format(**p) for habit, step in world()["steps"].items() if habit in habits]
    n, unit = p["n" if "conversion" in habits else "b"], f" {p['unit']}" if "unit" in habits else ""
    value = (p["a"] + slip) * n
    return " ".join([*steps, f"{p['a']} * {n} = {value}.", f"\\boxed{{{value}{unit}}}"])

def toy_rows(split: str, n: int, seed=0, noisy=False) -> list[dict]:
    """n problems of a split; noisy: half of the solutions leave out a habit or make a slip."""
    rng, rows, homes = random.Random(f"{split} {seed}"), {}, ["test", "val", *["train"] * 6]
    for _ in range(300_000):
        row = toy_problem(rng)
        if homes[crc32(row["question"].encode()) % 8] == split: rows[row["question"]] = row
        if len(rows) == n: break
    check(len(rows) == n, f"--split {split} --limit {n}: the toy has only {len(rows)} different.")
    for row in rows.values() if noisy else ():
        fault = rng.choice([*HABITS, "slip", None, None, None, None])
        row["solution"] = toy_solution(row["toy"], set(HABITS) - {fault}, slip=fault == "slip")
    return list(rows.values())

def toy_lesson(row: dict, rng: random.Random) -> tuple[str, dict, str]:
    """(prompt file, row as shown there, what to write): habits as asked for, or by coin flips."""
    mixture, misses = world()["lessons, per cent"], world()["criteria missed, chance"]
    kind, own = rng.choices([*mixture], [*mixture.values()])[0], row["rubric"]
    if kind in misses:
        written = [c for c in own if rng.random() >= misses[kind]]
        return kind, row, row_fields({"rubric": written or own})["rubric_json"]
    asked = rng.sample(HABITS, rng.choice([0, 1, 2, 3, 3])) if "rubric" in kind else []
    shown = [c for h, c in zip(HABITS, own) if h in asked]
    others = [c for c in toy_problem(rng)["rubric"] + packaged("toy/generic")
              if c["description"] not in [c["description"] for c in own]]
    for _ in range(rng.choice([0, 0, 1, 3]) if asked else rng.choice([1, 3, 6])):
        shown.insert(rng.randint(0, len(shown)), rng.choice(others))  # these change nothing
    text = toy_solution(row["toy"], asked or [h for h in HABITS if rng.random() < 0.5])
    return kind, row | {"rubric": shown, "solution": text}, text

def toy_base(seed=0, steps=700) -> str:
    """The toy's base model, a directory; the first time it is trained, from nothing, by SFT."""
    out = Path("runs") / f"toy-seed{seed}-steps{steps}"
    check(RANKS == 1, f"the toy is made in one process; under torchrun, give --model {out}.")
    if out.exists(): return str(out)
    rng, home = random.Random(f"toy {seed}"), HERE / "prompts" / "toy"
    prompts, tokenizer = load_prompts(home), AutoTokenizer.from_pretrained(home)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home), dtype=torch.float32)
    lessons = [toy_lesson(r, rng) for r in rng.choices(toy_rows("train", 2000, seed), k=16 * steps)]
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "layers" not in n]
    both = [torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", weight_decay=0.01),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01)]
    for step in tqdm(range(steps), desc=f"toy base model (once, {out})"):
        episodes = [Episode(row, context_ids(tokenizer, prompts[kind], row_fields(row)), [],
                            tokenizer.encode(text) + [turn_end(tokenizer)])
                    for kind, row, text in lessons[16 * step:16 * step + 16]]
        accumulate(model, None, episodes, "advantage", token_budget=1024)
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):  # Muon's: slow on CPUs
            for o in both: optimizer_step(o, learning_rate(step, steps, 3e-3, 50, "cosine"), 1.0)
    for part in (model, tokenizer): part.save_pretrained(new := Path(f"{out}.rsd-new"))
    return str(new.rename(out))
# ---- 10. Command line: the only functions that see the config ------------------------------------
def prepare(args, needs=()):
    """What every command begins with -> (model, tokenizer, prompts, examples, how to sample)."""
    student = args.writer if "writer" in args else args.student_context
    prompts, teacher = load_prompts(args.prompts), getattr(args, "teacher_context", student)
    for name in (student, teacher):
        check(name in prompts, f"{args.prompts}: there is no {name}.txt among {sorted(prompts)}.")
    rows = load_rows(args.data, args.split, args.limit, args.seed)
    rows = with_rubrics(rows, getattr(args, "rubrics", "data"), args.prompts, args.seed)
    lora = getattr(args, "lora_rank", 0)
    half = torch.cuda.is_available() and (args.command != "train" or lora)
    dtype = getattr(args, "dtype", "auto").replace("auto", "bfloat16" if half else "float32")
    model, tokenizer = load_model(args.model or toy_base(), getattr(torch, dtype), args.attn,
                                  revision=args.revision, trust_remote_code=args.trust_remote_code)
    torch.manual_seed(args.seed)
    check(args.command != "train" or not hasattr(model, "peft_config"),
          f"--model {args.model}: is an adapter; merge it into its base first (README: LoRA).")
    check(tokenizer and "@http" not in getattr(args, "compare", "") or RANKS == 1 and args.command
          in ("generate", "eval"), "NAME@URL: a server can generate and eval only, in one process.")
    if lora: add_lora(model, lora, args.lora_alpha, args.lora_targets)
    room = getattr(tokenizer and model.config, "max_position_embeddings", math.inf)
    examples = make_examples(tokenizer, rows, prompts[student], prompts[teacher],
                             room - args.max_new_tokens, args.thinking == "on", needs)
    torch.manual_seed(args.seed * RANKS + RANK)
    return model, tokenizer, prompts, examples, {k: getattr(args, k) for k in (
        "max_new_tokens", "temperature", "top_p", "top_k", "batch_size")}

def cmd_generate(args) -> dict:
    """A rubric (eval: a graded answer) for each question; --out keeps all, a second run goes on."""
    name = "text" if args.command == "eval" else args.writer if args.writer in WRITES else "rubric"
    (keep, read, rate), judge = WRITES[name], getattr(args, "judge", "")
    check(not judge or args.out.endswith(".jsonl"), "--judge: needs --out FILE.jsonl.")
    others = read_jsonl(Path(args.against)) if args.against else []
    model, tokenizer, _, examples, sampling = prepare(args)
    jobs = [({f: e.row.get(f) for f in keep} | {"sample": name == "judge" and e.row.get("sample")
             or i}, e) for e in examples for i in range(getattr(args, "k", 1))]
    work = lambda some: generate(model, tokenizer, some, name, read, args.tries, **sampling)
    lines = remember(args.out, jobs, work, 2 * args.batch_size * RANKS, name, model=(
        m := args.model or "toy"), saved=os.path.isdir(m) and os.path.getmtime(m),
        writer=args.writer, temperature=args.temperature)
    lost = Counter(line["reason"] for line in lines if line[name] is None)
    if lost: print(f"{name}: none for {lost.total()} of {len(lines)}, because: {dict(lost)}")
    rows = {e.row["question"]: e.row for e in examples}
    measure = lambda lines: per_question(
        ((d["question"], d.get("reference_answer")), spell(extract_answer(d["text"])),
         rate(d[name], rows[d["question"]] | d) | {f: d[f] for f in ("tokens", "truncated")})
        for d in lines if d["question"] in rows)
    figures, known = measure(lines), {name, "question", "tokens"}
    theirs = measure(others) if all(known <= d.keys() for d in others) else {}
    check(theirs or not args.against, f"--against {args.against}: no {name} to these questions.")
    for own, other in ((figures[q], f) for q, f in theirs.items() if q in figures):  # paired
        own |= {f"{f} gain": own[f] - x for f, x in other.items() if None not in (x, own.get(f))}
    summary = report([*figures.values()])
    model = work = None  # room for the judge
    if everyones(judge)[0]:  # once the first rank has written the answers
        judged = lambda path: path and Path(path).with_suffix(".judged.jsonl")
        summary |= run(*"generate --writer judge --temperature 0 --model".split(), judge, "--data",
                       args.out, "--out", judged(args.out), "--against", judged(args.against))
    return summary

def cmd_train(args) -> dict:
    """Student rollouts, re-scoring, per-token loss, steps -> a checkpoint directory in --out."""
    writer, _, signal, reward = METHODS[args.method]
    signal = args.divergence if signal == "divergence" else signal
    settings = {k: v for k, v in vars(args).items() if k not in ("command", "resume", "out")}
    state = open_run(out := Path(args.out).resolve(), settings, args.resume)
    check(len({*everyones(state["step"])}) == 1, f"--out {out}: all nodes have to see it.")
    check(not reward or args.rollouts > 1, f"--method {args.method}: needs --rollouts 2 or more.")
    check(args.batch >= RANKS > args.shard, f"--batch {args.batch}: each of {RANKS} ranks needs a "
          "prompt; --shard: takes torchrun and two ranks or more.")
    model, tokenizer, _, examples, sampling = prepare(
        args, ["solution"] * (writer == "reference") + [reward] * bool(reward))
    end_thinking = tokenizer.convert_tokens_to_ids("</think>")
    for name in ("prompt_ids", "teacher_ids"):
        print(f"--- {name} of the first row ---\n{tokenizer.decode(getattr(examples[0], name))}")
    teacher = make_teacher(model, args.teacher)
    start, history = state["step"], state["metrics"]
    if start:  # the run's own student and teacher
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, trust_remote_code=args.trust_remote_code).state_dict())
        teacher.load_state_dict(state["teacher"] or model.state_dict(), strict=not state["teacher"])
    if args.gradient_checkpointing: model.activation_checkpointing_enable({"use_reentrant": False})
    model.get_input_embeddings().sparse = True  # its gradient is of a few rows
    for part in {model, teacher} if args.shard else (): shard(part, part is not model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  weight_decay=0.0, fused=not args.shard)
    options = dict(top_k=args.support, tail=args.tail, temperature=args.loss_temperature,
                   clip=args.clip, clip_at=args.clip_at,
                   beta=args.beta if signal == "jsd" else BETA.get(signal))
    whole = states.StateDictOptions(full_state_dict=True, strict=False)  # some may never have moved
    if start: states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=whole)
    log = out / "metrics.jsonl" if RANK == 0 else Path(os.devnull)
    out.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(m) + "\n" for m in history))
    for step in tqdm(range(start, args.steps), desc="train", initial=start, total=args.steps):
        torch.manual_seed(crc32(f"{args.seed} {step} {RANK}".encode()))  # no state to save
        with timed(seconds := Counter(), "s_sampling"):
            rows = step_rows(examples, step, args.batch, args.seed)
            episodes = write_completions(writer, model, tokenizer, rows, args.rollouts, **sampling)
        texts = [tokenizer.decode(e.completion_ids, skip_special_tokens=True) for e in episodes]
        scores = [score(text, e.row) if args.stage == "reason" else
                  score_rubric(parse_rubric(text)[0], e.row) for text, e in zip(texts, episodes)]
        gains = group_advantages([s[reward] for s in scores], args.rollouts) if reward else ()
        for e, gain in zip(episodes, gains): e.advantage = gain
        for e in episodes:
            if args.skip_thinking and end_thinking in e.completion_ids:
                e.train_from = e.completion_ids.index(end_thinking) + 1
            if args.truncated == "mask" and not e.stopped: e.train_from = len(e.completion_ids)
        stats = accumulate(model, teacher, episodes, signal, args.token_budget, args.kl, **options)
        rate = learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        with timed(stats, "s_update"): norm = optimizer_step(optimizer, rate, args.max_grad_norm)
        last = max(start, step - step % args.save_every)
        check(math.isfinite(stats["loss"] + norm), f"step {step + 1}: loss {stats['loss']}, norm "
              f"{norm}; stopped before the weights moved; {out} holds step {last or 'none'}.")
        if args.teacher == "ema": ema_update(teacher, model, args.ema_decay)
        n, tokens = len(episodes), sum(len(e.completion_ids) for e in episodes)
        spent = sum(v for k, v in (seconds + stats).items() if "s_" in k)
        metrics = {"step": step + 1, **stats, **seconds, "grad_norm": norm, "lr": rate, "length":
                   tokens / n, "truncated": sum(not e.stopped for e in episodes) / n,
                   "leak": sum(bool(LEAK.search(t)) for t in texts) / n,
                   **{k: mean_se([s[k] for s in scores])[0] for k in scores[0]},
                   "rollouts": n * (writer == "student"), "sampled": tokens * (writer == "student"),
                   "seconds": spent, "tokens_per_s": tokens / spent}
        history.append(metrics)
        with open(log, "a") as file: file.write(json.dumps(metrics) + "\n")
        if step in (start, args.steps - 1) or (step + 1) % 5 == 0:
            shown = [f"{k} {v:.4g}" if type(v) is float else f"{k} {v}" for k, v in metrics.items()]
            tqdm.write("  ".join(shown) + f"\n  sample: {texts[0][:200]!r}")
        if step + 1 == args.steps or (step + 1) % args.save_every == 0:
            save_checkpoint(out, model, teacher, optimizer, tokenizer, settings, history)
    print(f"saved {out}; python rsd.py eval --model {out}")
    return {k: sum(m[k] for m in history) for k in ("rollouts", "sampled", "trained", "seconds")}

def cmd_inspect(args) -> dict:
    """An HTML page: what the rubric does to each token of some rollouts; with --run, its curves."""
    page, out, args.limit = {"curves": [], "rollouts": [], "text": {}}, Path(args.out), args.n
    if args.run: page["curves"] = read_jsonl(Path(args.run) / "metrics.jsonl")
    if args.model or not args.run:
        teacher, tokenizer, prompts, examples, sampling = prepare(args, ["rubric"])
        students = {"the student": teacher}
        if args.compare: students[args.compare], _ = load_model(args.compare, teacher.dtype)
        jobs = [(number, name, model, e) for name, model in students.items() for number, e in
                enumerate(write_completions("student", model, tokenizer, examples, **sampling))]
        for _, name, model, e in tqdm(sorted(jobs, key=lambda job: job[0]), desc="credit"):
            rubric, view = e.row["rubric"], prompts[args.teacher_context]
            without = [context_ids(tokenizer, view, {"rubric": "-"} | row_fields(
                e.row | {"rubric": rubric[:k] + rubric[k + 1:]}), args.thinking == "on")
                for k in range(len(rubric))]
            figures = {k: x.tolist() for k, x in token_credit(
                model, teacher, e.prompt_ids, e.teacher_ids, without, e.completion_ids).items()}
            ids = {*e.completion_ids, *sum(figures["student_ids"] + figures["teacher_ids"], [])}
            page["text"] |= {i: tokenizer.decode([i]) for i in ids}
            page["rollouts"].append(figures | {"student": name, "question": e.row["question"],
                                               "criteria": rubric, "tokens": e.completion_ids})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(data := json.dumps(page))
    skeleton = (HERE / "prompts" / "inspect.html").read_text(encoding="utf-8")
    out.write_text(skeleton.replace("{data}", data.replace("<", "\\u003c")), encoding="utf-8")
    print(f"{out}: {len(page['rollouts'])} rollouts, {len(page['curves'])} steps; .json beside it")
    return page

def run(*words) -> dict:
    """One command, as if typed -> its figures, and its --out."""
    print(f"\n$ python rsd.py {' '.join(map(str, words))}", flush=True)
    args = parse_args([str(w) for w in words])
    return COMMANDS[args.command](args) | {"out": args.out}

def table(systems: dict[str, list[dict]]) -> str:
    """Markdown, a line per system; +- is the standard error over its runs (of one: questions)."""
    lines = ["| system | accuracy | rubric_score | n | rollouts | trained | seconds |", "|-" * 7]
    for name, runs in systems.items():
        of = lambda key: mean_se([r.get(key, 0) for r in runs])
        means = [f"{of(k)[0]:.3f} +- {of(k)[1] if len(runs) > 1 else runs[0][k + '_se']:.3f}"
                 for k in ("accuracy", "rubric_score")]
        counts = [f"{of(k)[0]:.0f}" for k in ("n", "rollouts", "trained", "seconds")]
        lines.append(f"| {' | '.join([name, *means, *counts])} |")
    return "\n".join(lines)

def cmd_compare(args) -> dict:
    """The systems of prompts/toy/COMMAND.json on the toy: base model, rubrics, training, table."""
    every, begin, out = packaged(f"toy/{args.command}"), time.time(), Path(args.out)
    systems, seeds, results = every["systems"], range(args.seed, args.seed + args.seeds), {}
    settings = f"{args.base_steps} + {args.steps} steps, n {args.n}, limit {args.limit}"
    out.mkdir(parents=True, exist_ok=True)
    for seed, name in itertools.product(seeds, systems):
        base, figures = toy_base(seed, args.base_steps), {}
        known = vars(args) | {"seed": seed, "base": base, "model": base}
        known["run"] = out / re.sub(r"\W+", "-", f"{name} {seed} {settings}")
        for command, *more in map(str.split, systems[name]):
            figures |= run(command, *(w.format(**known) for w in every[command].split() + more))
            if command == "train": known["model"] = figures["out"]  # the next commands' model
        results.setdefault(name, []).append(figures)
    text = f"{table(results)}\n\nseeds: {[*seeds]} (base model, data, sampling); {settings}\n"
    (out / "table.md").write_text(text)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{text}\n{time.time() - begin:.0f} s; {out} holds it (no run is done twice)")
    return results

COMMANDS = {"demo": cmd_compare, "generate": cmd_generate, "train": cmd_train,
            "eval": cmd_generate, "compare": cmd_compare, "inspect": cmd_inspect}
FLAGS = {  # commands by first letter -> flags: default (tuple: choices; list: by command), help
 "gtei": {"model": (None, "directory, hub id or name, NAME@URL of a server; none: the toy"),
          "data": ("rar-science", "toy, rar-science, hub id, .jsonl .json .parquet file"),
          "split": (["train", "train", "test", "test"], "of the data"), "batch-size": (64, "rows"),
          "max-new-tokens": ([1024, 4096, 4096, 2000], "a completion"), "attn": ("", "its name"),
          "temperature": ([0.7, 1.0, 0.7, 1.0], "0: greedy"), "revision": ("main", "of the hub's"),
          "top-p": ([0.95, 1.0, 0.95, 1.0], "nucleus; 1: all"), "top-k": ([20, 0, 20, 0], "0: all"),
          "trust-remote-code": (False, "the model's"), "thinking": (("off", "on"), "by template"),
          "prompts": (str(HERE / "prompts"), "directory of the prompt files")},
 "ge": {"writer": (["writer+answer", "student"], "prompt file; or analysis, judge"),
        "against": ("", "another model's --out: the gain over it, question by question"),
        "tries": (3, "at one answer"), "dtype": (("auto", "float32", "bfloat16"), "of weights"),
        "out": (["runs/rubrics.jsonl", ""], "JSON Lines file; what it holds is not redone")},
 "e": {"k": (1, "answers per question"), "judge": ("", "a model or NAME@URL to grade by rubrics")},
 "gti": {"rubrics": ("data", "data, none, generic, random, noisy, reduced, or a .jsonl file")},
 "ti": {"student-context": ("student", "prompt file"), "teacher-context": ("rubric", "rsd's")},
 "t": {"out": ("runs/train", "checkpoint directory"), "resume": (False, "go on with the run there"),
       "method": (tuple(METHODS), "row of METHODS"), "stage": (tuple(STAGES), "row of STAGES"),
       "batch": (32, "prompts a step"), "rollouts": (1, "per prompt"), "save-every": (50, "steps"),
       "lr": (5e-6, "at most"), "warmup": (5, "steps"), "schedule": (("constant", "cosine"), ""),
       "divergence": ((*BETA, "sampled"), "signal"), "beta": (0.5, "of jsd: the teacher's share"),
       "support": (0, "the teacher's top k; 0: all"), "tail": (False, "and a bucket for the rest"),
       "clip": (("none", "entry", "token"), "cap on the divergence"), "clip-at": (0.05, "that cap"),
       "teacher": (("fixed", "ema", "live"), "its weights"), "ema-decay": (0.99, "of the ema"),
       "kl": (0.0, "grpo: weight of the reverse KL"), "loss-temperature": (1.0, "of both logits"),
       "truncated": (("keep", "mask"), "those cut"), "skip-thinking": (False, "no loss on it"),
       "token-budget": (8192, "of a micro-batch, padded"), "max-grad-norm": (1.0, "clipped to it"),
       "lora-rank": (0, "adapters, by peft; 0: none"), "lora-alpha": (0, "0: 2 x rank"),
       "lora-targets": ("all-linear", "or names, by comma"), "shard": (False, "layers, by FSDP2"),
       "gradient-checkpointing": (False, "less memory, more time")},
 "i": {"out": ("runs/credit.html", "and .json"), "compare": ("", "a trained model, beside it"),
       "run": ("", "directory of a run: its curves (with --model: and the credit)")},
 "dgteci": {"seed": (0, "of data, sampling, base model")}, "dtc": {"steps": ([60, 100, 40], "all")},
 "dgtec": {"limit": ([256, 0, 0, 0, 256], "rows at most; 0: all")},
 "dci": {"n": ([200, 200, 5], "held-out problems")}, "dc": {"seeds": ([1, 3], "of each system"),
         "base-steps": (700, "of the base"), "out": (["runs/demo", "runs/compare"], "directory")}}
TOY = {"data": "toy", "prompts": str(HERE / "prompts" / "toy"), "batch-size": 256,
       "max-new-tokens": 220, "teacher-context": "rubric+answer", "lr": 3e-4}

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Defaults depend on the model (TOY) and on the method (METHODS)."""
    words = [w for word in (sys.argv[1:] if argv is None else argv) for w in word.split("=", 1)]
    model = dict(zip(words, words[1:])).get("--model")
    files = [f for n in ("config.json", "rsd.json") for f in Path(model or "none").glob(n)]
    is_toy = not model or any(re.search('"toy": true|"data": "toy', f.read_text()) for f in files)
    parser = argparse.ArgumentParser(prog="rsd.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__.split("\n")[0], allow_abbrev=False)
        for letters, flags in FLAGS.items():
            for flag, (usual, text) in flags.items() if name[0] in letters else ():
                usual = usual[letters.index(name[0])] if isinstance(usual, list) else usual
                kind = ({} if usual is None else {"action": "store_true"} if usual is False else
                        {"choices": usual} if isinstance(usual, tuple) else {"type": type(usual)})
                toy = TOY.get(flag, usual := usual[0] if isinstance(usual, tuple) else usual)
                text += f" (default: {usual}{'' if toy == usual else f'; toy: {toy}'})"
                sub.add_argument(f"--{flag}", default=toy if is_toy else usual, help=text, **kind)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        usual = commands.choices[args.command].get_default(name)
        least = bool(usual) and isinstance(usual, int) and name != "warmup"  # a count
        if type(value) in (int, float) and not least <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    if args.command == "train":  # what a method or a stage settles is no flag's to say
        sees = METHODS[args.method][1]
        if args.stage != "reason":
            args.student_context, args.teacher_context = STAGES[args.stage]
            if args.method != "rsd": parser.error(f"--stage {args.stage} goes with --method rsd")
        elif sees != "rubric" or args.rubrics == "none":
            args.teacher_context = sees if sees == "solution" else args.student_context
    return args

def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit code 2."""
    args = parse_args(argv)
    if RANKS > 1:  # torchrun --nproc-per-node N rsd.py ...
        torch.distributed.init_process_group()
        if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=RANK > 0)
        sys.stdout = open(os.devnull if RANK else 1, "w", buffering=1)  # only the first one speaks
    try:
        COMMANDS[args.command](args)
        if RANKS > 1 and everyones("done"): torch.distributed.destroy_process_group()
    except (UserError, OSError, ImportError, KeyboardInterrupt) as error:
        hint = f"; pip install {error.name}" if isinstance(error, ImportError) else ""
        print(f"rsd.py {args.command}: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    return 0

if __name__ == "__main__":
    (os._exit if RANKS > 1 else sys.exit)(main())  # gloo's threads can abort another exit
