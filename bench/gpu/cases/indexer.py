"""The lightning indexer: scores, the best 2,048 of them, and both in one call, from caches and for prompts."""

from functools import partial

import torch

import mla_kernels as mk
from mla_kernels.device.case import Case, Place, Problem, variants
from mla_kernels.device.cases.decode import PAGE, slots_of

HEADS, WIDTH, TOP_K = 64, 128, 2048
KEY_SCALE = 0.5
E4M3 = torch.float8_e4m3fn
UNPAGED_KEYS = 1 << 21


def logits(q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Exact scores [K] of one query: q [heads, 128], w [heads], keys [K, 128] in float32."""
    return torch.einsum("h,hk->k", w, torch.relu(q.float() @ keys.t()))


class Cached:
    """Sequences of indexer keys in a paged fp8 cache, and queries whose values fp8 holds exactly: ``q`` in bf16, and
    ``asked`` as our op takes them, with ``codes`` in fp8, as DeepGEMM does."""

    def __init__(self, batch: int, keys: int, codes: bool, place: Place, heads: int = HEADS):
        self.batch, self.keys = place.size(batch, min(batch, 2)), place.size(keys, 512)
        pages = self.keys // PAGE
        self.bytes = self.batch * self.keys * (WIDTH + 4)
        self.flops = 2 * self.batch * self.keys * heads * WIDTH
        self.copies = place.copies(self.bytes, 8)
        pool = self.copies * self.batch * pages
        self.cache = mk.IndexerCache.allocate(pool, PAGE, layout="fp8", device=place.device)
        if place.values:
            values = torch.randn(pool, PAGE, WIDTH, device=place.device).to(E4M3)
            self.cache.keys.copy_(values.view(torch.uint8))
            self.cache.scales.fill_(KEY_SCALE)
        self.tables = place.ints(torch.randperm(pool).view(self.copies, self.batch, pages))
        self.lengths = place.ints(torch.full((self.batch,), self.keys))
        quantised = place.normal(self.batch, 1, heads, WIDTH).to(E4M3)
        self.q = quantised.bfloat16()
        self.asked = quantised if codes else self.q
        self.w = place.normal(self.batch, 1, heads, dtype=torch.float32)

    def first(self) -> torch.Tensor:
        """Exact scores of the first sequence."""
        pages = self.tables[0, 0].long()
        keys = self.cache.keys[pages].view(E4M3).float() * self.cache.scales[pages][..., None]
        return logits(self.q[0, 0], self.w[0, 0], keys.view(-1, WIDTH))

    def in_rows(self) -> torch.Tensor:
        """Keys [copies, batch, keys, 128], bf16."""
        keys = self.cache.keys[self.tables.long()].view(E4M3).bfloat16() * KEY_SCALE
        return keys.view(self.copies, self.batch, self.keys, WIDTH)


def scores(batch: int, keys: int, codes: bool, place: Place, peers) -> Problem:
    at = Cached(batch, keys, codes, place)

    def call(**more):
        return lambda copy: mk.paged_indexer_logits(at.asked, at.cache, at.w, at.tables[copy], at.lengths, **more)

    problem = Problem(
        call(), at.first, lambda found: found.reshape(-1, found.shape[-1])[0, : at.keys],
        bytes=at.bytes + 4 * at.batch * at.keys, flops=at.flops, copies=at.copies,
    )  # fmt: skip
    variants(problem, mk.paged_indexer_logits, call, place, codes)
    if peers.deepgemm:
        scored = peers.deepgemm.paged_logits(at.cache, at.q, at.w, at.lengths, at.keys)
        problem.add("DeepGEMM", lambda copy: scored(at.tables[copy]))
    return problem


def selection(batch: int, keys: int, codes: bool, place: Place, peers, heads: int = HEADS) -> Problem:
    at, top_k = Cached(batch, keys, codes, place, heads), place.size(TOP_K, 64)

    def values(positions: torch.Tensor) -> torch.Tensor:
        """Exact scores of the chosen keys of the first sequence, sorted: what is chosen, whatever the order."""
        chosen = positions.reshape(at.batch, -1)[0].long()
        if chosen.unique().numel() != top_k:
            raise ValueError(f"{chosen.unique().numel()} different keys were chosen, {top_k} are asked for")
        return at.first()[chosen].sort().values

    def values_of_slots(slots: torch.Tensor) -> torch.Tensor:
        position = torch.full((at.cache.num_slots,), -1, dtype=torch.long, device=slots.device)
        position[slots_of(at.tables[0, 0])] = torch.arange(at.keys, device=slots.device)
        return values(position[slots.reshape(at.batch, -1).long()])

    def call(**more):
        return lambda copy: mk.select_slots(at.asked, at.cache, at.w, at.tables[copy], at.lengths, top_k, **more)

    problem = Problem(
        call(), lambda: at.first().topk(top_k).values.sort().values, values_of_slots, bytes=at.bytes, flops=at.flops,
        copies=at.copies, host=at.batch == 1,
    )  # fmt: skip
    variants(problem, mk.select_slots, call, place, codes)
    if place.values and at.batch * at.keys <= UNPAGED_KEYS:
        rows = at.in_rows()

        def composed(copy: int):
            found = torch.relu(torch.bmm(at.q[:, 0], rows[copy].transpose(1, 2)).float())
            return torch.einsum("bh,bhk->bk", at.w[:, 0], found).topk(top_k, -1).indices

        problem.add("torch, keys not paged", composed, "unpaged", pick=values)
    if peers.deepgemm:
        scored = peers.deepgemm.paged_logits(at.cache, at.q, at.w, at.lengths, at.keys)
        if peers.vllm:
            best = peers.vllm.top_k(at.lengths, top_k, at.keys)
            problem.add("DeepGEMM and vLLM's top-k", lambda copy: best(scored(at.tables[copy])), pick=values)
        joined = lambda copy: scored(at.tables[copy])[:, : at.keys].topk(top_k, -1).indices  # noqa: E731
        problem.add("DeepGEMM and torch.topk", joined, pick=values)
    return problem


def top_k(rows: int, columns: int, place: Place, peers) -> Problem:
    chosen, columns, rows = place.size(TOP_K, 64), place.size(columns, 1024), place.size(rows, min(rows, 3))
    values = place.normal(rows, columns, dtype=torch.float32)
    lengths = place.ints(torch.full((rows,), columns))

    def call(**more):
        return lambda copy: mk.indexer_topk(values, chosen, **more)

    problem = Problem(
        call(), lambda: values.topk(chosen).values.sort(-1).values,
        lambda ids: values.gather(1, ids.long()).sort(-1).values, bytes=values.nbytes, limit=1e-6,
    )  # fmt: skip
    variants(problem, mk.indexer_topk, call, place)
    problem.add("torch.topk", lambda copy: values.topk(chosen, -1).indices)
    if peers.vllm:
        for name, run in peers.vllm.top_ks(lengths, chosen, columns).items():
            problem.add(f"vLLM, {name}", lambda copy, run=run: run(values))
    return problem


class Prompt:
    """A causal chunk of a prompt over keys in rows that are codes; ``asked``: the queries as our op takes them."""

    def __init__(self, tokens: int, keys: int, codes: bool, place: Place):
        self.tokens, self.keys = place.size(tokens, 16), place.size(keys, 512)
        self.k = place.normal(self.keys, WIDTH).to(E4M3)
        self.k_scale = torch.full((self.keys,), KEY_SCALE, device=place.device)
        quantised = place.normal(self.tokens, HEADS, WIDTH).to(E4M3)
        self.w = place.normal(self.tokens, HEADS, dtype=torch.float32)
        self.q = quantised.bfloat16()
        self.asked = quantised if codes else self.q
        self.ends = place.ints(torch.arange(self.keys - self.tokens + 1, self.keys + 1))
        self.starts = torch.zeros_like(self.ends)
        self.flops = 2 * self.tokens * self.keys * HEADS * WIDTH

    def last(self) -> torch.Tensor:
        """Exact scores of the last token."""
        return logits(self.q[-1], self.w[-1], self.k.float() * KEY_SCALE)


def prompt_scores(tokens: int, keys: int, codes: bool, place: Place, peers) -> Problem:
    at = Prompt(tokens, keys, codes, place)

    def call(**more):
        return lambda copy: mk.indexer_logits(at.asked, at.k, at.w, at.starts, at.ends, k_scale=at.k_scale, **more)

    problem = Problem(
        call(), at.last, lambda found: found[-1, : at.keys],
        bytes=at.keys * (WIDTH + 4) + 4 * at.tokens * at.keys, flops=at.flops,
    )  # fmt: skip
    variants(problem, mk.indexer_logits, call, place, codes)
    if peers.deepgemm:
        scored = peers.deepgemm.prompt_logits(at.q, at.k, at.k_scale, at.w, at.starts, at.ends)
        problem.add("DeepGEMM", lambda copy: scored())
    return problem


def prompt(tokens: int, keys: int, codes: bool, place: Place, peers) -> Problem:
    at, chosen = Prompt(tokens, keys, codes, place), place.size(TOP_K, 64)

    def call(**more):
        given = at.asked, at.k, at.w, at.starts, at.ends, chosen
        return lambda copy: mk.select_keys(*given, k_scale=at.k_scale, **more)

    problem = Problem(
        call(), lambda: at.last().topk(chosen).values.sort().values,
        lambda ids: at.last()[ids[-1].long()].sort().values, bytes=at.keys * (WIDTH + 4), flops=at.flops,
    )  # fmt: skip
    variants(problem, mk.select_keys, call, place, codes)

    def composed(copy: int):
        found = torch.relu(torch.einsum("thd,kd->thk", at.q, at.k.bfloat16() * KEY_SCALE).float())
        unseen = torch.arange(at.keys, device=at.q.device) >= at.ends[:, None]
        return torch.einsum("th,thk->tk", at.w, found).masked_fill(unseen, float("-inf")).topk(chosen, -1).indices

    problem.add("torch", composed)
    if peers.deepgemm and peers.vllm:
        scored = peers.deepgemm.prompt_logits(at.q, at.k, at.k_scale, at.w, at.starts, at.ends)
        best = peers.vllm.top_k_of_prompt(at.starts, at.ends, chosen)
        problem.add("DeepGEMM and vLLM's top-k", lambda copy: best(scored()))
    return problem


_BATCHES = ((1, 65536, 0), (64, 16384, 0), (16, 65536, 1), (1, 16384, 1), (64, 65536, 2))


_ASKED = {"selection": {"DeepGEMM and vLLM's top-k": 1.0}, "logits": {"DeepGEMM": 1.0}, "top-k": {"vLLM": 1.0}}


def _case(name: str, part: str, priority: int, build, *sizes: int) -> Case:
    """What is asked is asked of fp8 queries: DeepGEMM takes no others."""
    asked = _ASKED[part] if part == "top-k" or sizes[-1] else {}
    return Case(name, "indexer", f"indexer, {part}", priority, partial(build, *sizes), asked)


_FORMS = ((False, ""), (True, ", fp8 queries"))
CASES = (
    *(
        case
        for codes, form in _FORMS
        for case in (
            *(_case(f"select_slots b{b} {k // 1024}k{form}", "selection", p, selection, b, k, codes)
              for b, k, p in _BATCHES),
            *(_case(f"logits b{b} {k // 1024}k{form}", "logits", min(2, p + 1), scores, b, k, codes)
              for b, k, p in _BATCHES),
            _case(f"select_keys 1024x16k{form}", "selection", 1, prompt, 1024, 16384, codes),
            _case(f"prompt logits 1024x16k{form}", "logits", 1, prompt_scores, 1024, 16384, codes),
        )
    ),
    Case("select_slots h32 b16 64k, fp8 queries", "indexer", "indexer, selection, GLM-5", 2,
         partial(selection, 16, 65536, True, heads=32)),
    _case("topk 64x16k", "top-k", 1, top_k, 64, 16384),
    _case("topk 1x64k", "top-k", 1, top_k, 1, 65536),
    _case("topk 1x128k", "top-k", 1, top_k, 1, 131072),
    _case("topk 16x128k", "top-k", 2, top_k, 16, 131072),
)  # fmt: skip
