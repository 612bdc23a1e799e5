"""
Three fast paths on a GPU (Triton), each beside the plain reference that defines it:
topk_autoencode, one SAE layer; mlp, a block's MLP; linear_cross_entropy, the output head and the loss.

The layer:

    a = relu((h - b_dec) W_enc^T + b_enc)      (N, F), the products in h's dtype, their sums in fp32
    values, indices = the K largest of a       (N, K), descending, ties: lowest index first
    y = values W_dec[indices] + b_dec          (N, C)

Only the product has to be dense. The rest touches K of F features a token:

    forward   cuBLAS writes the product of some rows to a small buffer, and _select reads it once; on
              Hopper _matmul writes it with the maxima of its groups of columns, and _select reads
              these and the best groups; _gather_sum adds K rows of W_dec
    backward  the (feature, token) pairs are sorted by feature, once; _pair_sums walks each
              feature's tokens for d values, dW_dec, dW_enc and db_enc together;
              _gather_sum adds K rows of W_enc for dh

Kept for backward: h, values and indices; nothing of size (N, F). No atomics: sums run in a fixed
order, so two runs on one card agree to the bit.

Shapes: N tokens (= B*T), C n_embd, F features, K active features a token.
W_enc (F, C), b_enc (F,), W_dec (F, C), b_dec (C,).
Without Triton or a GPU this file still imports, and everything below runs the reference.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F_

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    jit = triton.jit
except ImportError:  # no Triton (CPU wheels, macOS): keep the kernels' names, never launch them
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda fn: fn

MAX_K = 512    # the final sort of _select is held in registers
MAX_C = 4096   # _pair_sums holds three rows of C in registers, 4 tiles of up to 1024

# Launch shapes, from a sweep of one at a time on one H200, bf16, N=32768, C=768. In brackets the ms
# measured, at F=12288, K=32 unless said otherwise. Only PAIR_PART, PAIR_MB and PAIR_MIN
# touch results: how sums round.
BUFFER_MB = 1024     # the encoder's output, hence how many rows at a time: the forward pass (1.41;
                     # 512: 1.44, 2048: 1.41), at N=65536 (2.73; 512: 2.81, 2048: 2.70)
SELECT_GROUPS = 8    # groups in _select's first pass, as a multiple of K (0.300; 4 or 2: 0.351)
SELECT_WARPS = 1     # a row, more where K > 64: one needs no barriers (2: 0.376, 4: 0.460)
GATHER_ROWS = 16     # rows of W in flight a program (0.170; 8: 0.171, 4: 0.174, 32: 0.180)
GATHER_COLS = 256    # columns a program, which is one warp: 32 lanes times 16 bytes of bf16
                     # (512: 0.194 on one warp, 0.201 on two; 1024 on four: 0.181)
PAIR_ROWS = 3        # tokens in flight a program (_weight_grads: 0.568; 2: 0.597; before the next pairs
                     # were read ahead 0.642)
PAIR_PART = 128      # pairs a program; busier features are split (0.863; 256: 0.933, 512: 0.934)
PAIR_MB = 33         # of h and gy a chunk of tokens, or more, so that they stay in the L2, but no chunks
PAIR_MIN = 56        # of fewer pairs a feature: at N=65536 3 (1.083; 2: 1.096, 4: 1.131, 5: 1.173), at
                     # N=32768 one (0.534; 2: 0.606), with K=64 two (0.963; one: 1.054)
# _matmul's tiles M, N, K, how many are in flight, and rows of tiles at a time; N=65536, C=768, one H200.
# The MLP, forward and backward: 0.443, 0.576 (two in flight: 0.563, 0.718; 256, 128: 0.465, 0.602; 128, 128
# and four: 0.484, 0.696; cuBLAS with relu^2 in a kernel of its own: 0.615, 0.717); the whole MLP
# takes 2.62, from torch.compile 2.92.
MLP_TILE = 128, 256, 64, 3, 8
# The encoder with maxima: 1.87 (three in flight 1.95; rows 8: 1.90, 4: 1.93; 256, 128: 2.16; 128, 128 two a
# multiprocessor: 2.22; cuBLAS without maxima 1.67), after which _select takes 0.29, not 0.63.
ENCODER_TILE = 128, 256, 64, 4, 16
SPAN = 64            # columns a maximum (the encoder 1.96, _select at N=32768 0.150, F=49152, K=64 0.316;
                     # 32: 1.97, 0.147, 0.439)
MATMUL_ROWS = 1024   # fewer tokens, as in sampling, are left to cuBLAS
# The loss, from a sweep on one H100 at N=32768, C=768, V=50304, bf16; in brackets the ms of forward
# and backward, of which matmuls take 10 and _softmax_loss 3.6 (torch.compile's two kernels: 5.0).
LOGITS_MB = 2048     # the logits, hence how many rows at a time: 16384 (1024: 15.3, 2048: 15.0, 4096: 14.7)
LOSS_BLOCK = 2048    # columns in registers at once (14.9; 4096: 15.2, 8192 on 32 warps: 15.2, on 16: 15.6)
LOSS_WARPS = 4       # a row (_softmax_loss alone, 16384 rows on one H200: 1.240; 2: 1.278, 8: 1.377)


# ---------------------------------------------------------------------------- plain reference
def topk_ref(pre, b_enc, k):
    """The selection, exactly: pre (N, F), b_enc (F,) -> values (N, k) fp32 or fp64, indices
    (N, k) int64; descending, ties by lowest index, NaN first. Slow: a full stable sort."""
    a = torch.relu(pre.to(b_enc.dtype) + b_enc)
    values, indices = a.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def topk_autoencode_ref(h, W_enc, b_enc, W_dec, b_dec, k):
    """The layer in plain PyTorch with autograd; same arguments and results as topk_autoencode.
    torch.topk leaves the choice among equal values open, so ties may differ from the kernels."""
    x = (h - b_dec).to(h.dtype)
    pre = F_.linear(x, W_enc.to(h.dtype))                                   # (N, F)
    values, indices = torch.relu(pre.to(b_enc.dtype) + b_enc).topk(k, dim=-1)
    z = torch.zeros_like(pre).scatter(1, indices, values.to(pre.dtype))
    y = z @ W_dec.to(h.dtype) + b_dec
    return y.to(h.dtype), values, indices, fired_ref(values, indices, W_enc.shape[0])


def fired_ref(values, indices, F):
    """values, indices (..., K) -> (F,) bool: which features are active anywhere."""
    slot = torch.where(values != 0, indices, F).flatten()   # inactive slots go to a spare row
    fired = torch.zeros(F + 1, dtype=torch.bool, device=values.device)
    return fired.index_fill(0, slot.long(), True)[:-1]


# ---------------------------------------------------------------------------- selection
@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _key(a):
    """fp32 -> int32 that orders as relu(a): 0 where a is not positive, the largest for NaN."""
    key = tl.where(a > 0, a.to(tl.int32, bitcast=True), 0)
    return tl.where(a == a, key, 0x7FFFFFFF)


@jit
def _rank(hit):
    """(R, 8) booleans -> each one's rank among the true ones in reading order, and their count."""
    hit = hit.to(tl.int32)
    each = tl.sum(hit, axis=1)
    before = tl.cumsum(each, axis=0) - each
    return before[:, None] + tl.cumsum(hit, axis=1) - hit, tl.sum(each, axis=0)


@jit
def _collect(pre, b_enc, groups, n_groups, found, above, n_above, F: tl.constexpr, G: tl.constexpr,
             EIGHTS: tl.constexpr, LIST: tl.constexpr, CAP: tl.constexpr, TIES: tl.constexpr):
    """Of the listed groups' elements, write those with key > above to found, in index order, then
    (TIES) those with key == above from slot n_above on; slots from CAP on are dropped. Returns the
    number with key > above. An entry is key << 32 | (2^31 - 1 - index): larger is better."""
    n_gt = 0
    n_eq = n_above
    for start in range(0, F, 8 * EIGHTS * G):
        first = 0
        while first < n_groups * EIGHTS:
            slot = first + tl.arange(0, LIST)
            first += LIST
            group = tl.load(groups + slot // EIGHTS, mask=slot < n_groups * EIGHTS, other=F)   # F: out of the row
            i = start + (group * EIGHTS + slot % EIGHTS)[:, None] * 8 + tl.arange(0, 8)[None, :]
            a = tl.load(pre + i, mask=i < F, other=float("-inf")).to(tl.float32)
            key = _key(a + tl.load(b_enc + i, mask=i < F, other=0.0))
            entry = (key.to(tl.int64) << 32) | (0x7FFFFFFF - i)
            hit = key > above
            rank, count = _rank(hit)
            tl.store(found + n_gt + rank, entry, mask=hit & (n_gt + rank < CAP))
            n_gt += count
            if TIES:
                hit = key == above
                rank, count = _rank(hit)
                tl.store(found + n_eq + rank, entry, mask=hit & (n_eq + rank < CAP))
                n_eq += count
    return n_gt


@jit
def _select(pre, b_enc, maxima, values, indices, fired, groups, found, F: tl.constexpr, K: tl.constexpr,
            KP: tl.constexpr, G: tl.constexpr, EIGHTS: tl.constexpr, CAP: tl.constexpr):
    """
    One row of pre (fp32 sum with b_enc, relu) -> its K largest, exactly, ties by lowest index;
    and a 1 in fired for each of them that is active.

    Bytes: the row once from memory (0.8 GB at N=32768, F=12288 in bf16: 0.19 ms at 4.3 TB/s).
    Bisecting the whole row bit by bit would be bound by instructions (1.6 ms); so
    1. one maximum for each of G groups (8 adjacent elements in every slab of 8 G): about three
       instructions an element, all within a thread; or, from the encoder, of 8 EIGHTS adjacent
       elements, so that the row itself is not read;
    2. the K-th largest of the G maxima, by bisection, bounds the row's K-th largest from below,
       and only groups whose maximum reaches it can hold one of the K: list them (about K of G);
    3. read only the listed groups again and keep what reaches the bound: with G = 8 K about 1.07 K
       elements, when the large ones are not crowded into few groups;
    4. more than CAP kept (crowded, or many ties): bisect the listed groups' elements for the exact
       K-th largest. Always right, merely slower;
    5. sort the CAP kept; where fewer than K are positive, fill up with the first inactive features.
    """
    row = tl.program_id(0).to(tl.int64)
    pre += row * F
    groups += row * G
    found += row * CAP
    g = tl.arange(0, G)

    # 1. the maximum of each group
    if maxima is None:
        best = tl.full([G], 0.0, tl.float32)
        for start in range(0, F, 8 * G):
            i = start + g[:, None] * 8 + tl.arange(0, 8)[None, :]
            a = tl.load(pre + i, mask=i < F, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
            a += tl.load(b_enc + i, mask=i < F, other=0.0)
            best = _larger(best, tl.reduce(a, 1, _larger))
    else:
        in_row: tl.constexpr = (F + 8 * EIGHTS - 1) // (8 * EIGHTS)
        best = tl.load(maxima + row * in_row + g, mask=g < in_row, other=0.0)
    best_key = _key(best)

    # 2. the largest bound that at least K of the maxima reach; any bound with exactly K will do
    top = tl.max(best_key, axis=0)
    lo = top * 0
    hi = top
    reach = lo + G
    while (reach != K) & (lo < hi):
        mid = hi - (hi - lo) // 2
        count = tl.sum((best_key >= mid).to(tl.int32), axis=0)
        reach = tl.where(count >= K, count, reach)
        lo = tl.where(count >= K, mid, lo)
        hi = tl.where(count >= K, hi, mid - 1)
    bound = tl.maximum(lo, 1)
    listed = (best_key >= bound).to(tl.int32)
    n_groups = tl.sum(listed, axis=0)
    tl.store(groups + tl.cumsum(listed, axis=0) - 1, g, mask=listed == 1)
    tl.debug_barrier()

    # 3. what reaches the bound
    n = _collect(pre, b_enc, groups, n_groups, found, bound - 1, 0, F, G, EIGHTS, KP, CAP, False)

    # 4. too many: the exact K-th largest key, `hi`: fewer than K lie above it
    if n > CAP:
        tl.debug_barrier()
        lo = bound - 1
        hi = top
        n_above = n * 0
        while hi - lo > 1:
            mid = lo + (hi - lo) // 2
            count = _collect(pre, b_enc, groups, n_groups, found, mid, 0, F, G, EIGHTS, KP, 0, False)
            n_above = tl.where(count < K, count, n_above)
            hi = tl.where(count < K, mid, hi)
            lo = tl.where(count < K, lo, mid)
        _collect(pre, b_enc, groups, n_groups, found, hi, n_above, F, G, EIGHTS, KP, CAP, True)
        n = n * 0 + K
    tl.debug_barrier()

    # 5. sort, and fill up
    slot = tl.arange(0, CAP)
    entry = tl.load(found + slot, mask=slot < n, other=0)
    entry = tl.sort(entry, descending=True)
    ok = (slot < K) & (slot < n)
    value = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(values + row * K + slot, value, mask=ok)
    index = 0x7FFFFFFF - (entry & 0x7FFFFFFF).to(tl.int32)
    tl.store(indices + row * K + slot, index, mask=ok)
    tl.store(fired + index, 1, mask=ok)   # all stores to a byte store the same
    if n < K:   # all n positive ones are known, so the first K features hold K - n inactive ones
        i = tl.arange(0, KP)
        a = tl.load(pre + i, mask=i < K, other=1.0).to(tl.float32)
        a += tl.load(b_enc + i, mask=i < K, other=0.0)
        idle = ((_key(a) == 0) & (i < K)).to(tl.int32)
        rest = n + tl.cumsum(idle, axis=0) - 1
        tl.store(values + row * K + rest, i * 0.0, mask=(idle == 1) & (rest < K))
        tl.store(indices + row * K + rest, i, mask=(idle == 1) & (rest < K))


def _select_rows(pre, b_enc, values, indices, fired, maxima=None):
    """Launch _select: pre (n, F) contiguous, maxima (n, F / SPAN) fp32 from _matmul -> fills values
    (n, K) fp32, indices (n, K) int32 and fired (F,) uint8, which begins as zeros."""
    (n, F), K = pre.shape, values.shape[1]
    KP = triton.next_power_of_2(K)
    # at least K groups, or there is no K-th largest; no more than there are eights in a row
    G = max(KP, min(max(128, SELECT_GROUPS * KP), triton.next_power_of_2(F) // 8))
    eights = 1
    if maxima is not None:
        G, eights = max(KP, triton.next_power_of_2(maxima.shape[1])), SPAN // 8
    CAP = 2 * KP
    groups = torch.empty(n, G, dtype=torch.int32, device=pre.device)
    found = torch.empty(n, CAP, dtype=torch.int64, device=pre.device)
    _select[(n,)](pre, b_enc, maxima, values, indices, fired, groups, found, F=F, K=K, KP=KP, G=G,
                  EIGHTS=eights, CAP=CAP, num_warps=max(SELECT_WARPS, KP // 64))


# ---------------------------------------------------------------------------- gathers
@jit
def _gather_sum(coef, index, W, bias, out, C: tl.constexpr, K: tl.constexpr,
                R: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """
    out[n] = sum_k coef[n, k] W[index[n, k]] (+ bias): the decoder, and dh with W_enc.

    Bytes: N K C of W's type, 1.6 GB at N=32768, K=32, C=768 in bf16, but W (19 MB at F=12288) lives
    in the 60 MB L2, so the floor is the L2's rate: about 0.3 ms at 5.5 TB/s. One program is one
    warp: BLOCK columns of one token, R rows of W in flight, sums in fp32. Slots with coef 0 are
    not read.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        acc += tl.load(bias + c, mask=c < C, other=0.0)
    for k0 in range(0, K, R):
        k = k0 + tl.arange(0, R)
        a = tl.load(coef + n * K + k, mask=k < K, other=0.0)
        f = tl.load(index + n * K + k, mask=k < K, other=0).to(tl.int64)
        w = tl.load(W + f[:, None] * C + c[None, :], mask=(a != 0)[:, None] & (c < C)[None, :],
                    other=0.0)
        acc += tl.sum(a[:, None] * w.to(tl.float32), axis=0)
    tl.store(out + n * C + c, acc.to(out.dtype.element_ty), mask=c < C)


def _gather(coef, index, W, bias, dtype):
    (N, K), C = coef.shape, W.shape[1]
    out = torch.empty(N, C, dtype=dtype, device=W.device)
    BLOCK = min(GATHER_COLS, triton.next_power_of_2(C))
    _gather_sum[(N, triton.cdiv(C, BLOCK))](
        coef, index, W, W if bias is None else bias, out, C=C, K=K, R=GATHER_ROWS,
        BLOCK=BLOCK, BIAS=bias is not None, num_warps=1)
    return out


# ---------------------------------------------------------------------------- weight gradients
@jit
def _pairs(order, i, end, R: tl.constexpr):
    """The next R pairs, each n * K + k."""
    pairs = ()
    for r in tl.static_range(R):
        pairs += (tl.load(order + i + r, mask=i + r < end, other=0).to(tl.int32),)
    return pairs


@jit
def _pair_sums(gy, h, values, gvalues, W_dec, b_dec, order, starts, owner, first,
               dvalues, dW_enc, dW_dec, db_enc, part_enc, part_dec, part_b,
               F: tl.constexpr, RUNS: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
               PART: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """
    All that one feature f sends back, over the pairs (token n, slot k) of a run in which it is active:

        dv = gy[n] . W_dec[f] + gvalues[n, k]         dvalues[n, k] = dv, for dh later
        dW_dec[f] = sum v gy[n]    dW_enc[f] = sum dv (h[n] - b_dec)    db_enc[f] = sum dv

    Walking by feature gathers gy and h once (2 N K C of bf16: 3.2 GB at N=32768, K=32, C=768, most
    of it L2 hits as neighbouring programs meet the same tokens: about 0.6 ms), holds W_dec[f] and
    both sums in registers, and needs no other pass for dv. Program p < RUNS takes the first PART
    pairs of run p, which is feature p % F in one chunk of tokens (see _sort_pairs). Some features
    fire on a third of all tokens, so the rest is cut into further parts, programs RUNS + e, whose
    sums go to part_*[e] and are added by _add_parts in order: no atomics. h - b_dec is summed as
    sum dv h - b_dec sum dv: no copy of it is kept.
    """
    p = tl.program_id(0)
    run = p
    part = 0
    if p >= RUNS:
        run = tl.load(owner + p - RUNS)
        if run >= RUNS:
            return
        part = p - RUNS - tl.load(first + run) + 1
    begin = tl.load(starts + run) + part * PART
    end = tl.minimum(begin + PART, tl.load(starts + run + 1))

    # A row of C is TILES blocks of one program's width, in tuples: C = 768 is not a power of two,
    # and a block of 1024 on four warps would leave one idle and need barriers for the dot product.
    w, enc, dec, b = (), (), (), 0.0
    for t in tl.static_range(TILES):
        c = t * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(W_dec + (run % F).to(tl.int64) * C + c, mask=c < C, other=0.0)
        w += (row.to(gy.dtype.element_ty).to(tl.float32),)   # as the forward read it
        enc += (tl.zeros([BLOCK], tl.float32),)
        dec += (tl.zeros([BLOCK], tl.float32),)
    i = begin
    pair = _pairs(order, i, end, R)
    while i < end:
        v, dv, g, x = (), (), (), ()   # all loads of R pairs first, then the sums
        ahead = _pairs(order, i + R, end, R)   # the next rows' addresses must not wait for this
        for r in tl.static_range(R):
            v += (tl.load(values + pair[r], mask=i + r < end, other=0.0),)
            if gvalues is not None:
                dv += (tl.load(gvalues + pair[r], mask=i + r < end, other=0.0),)
            for t in tl.static_range(TILES):
                c = t * BLOCK + tl.arange(0, BLOCK)
                at = (pair[r] // K).to(tl.int64) * C + c
                live = c < tl.where(i + r < end, C, 0)
                g += (tl.load(gy + at, mask=live, other=0.0),)
                x += (tl.load(h + at, mask=live, other=0.0),)
        for r in tl.static_range(R):
            dot = tl.zeros([BLOCK], tl.float32)
            for t in tl.static_range(TILES):
                dot += g[r * TILES + t].to(tl.float32) * w[t]
            d = tl.sum(dot, axis=0)
            if gvalues is not None:
                d += dv[r]
            tl.store(dvalues + pair[r], d, mask=i + r < end)
            b += d
            old_enc, old_dec, enc, dec = enc, dec, (), ()
            for t in tl.static_range(TILES):
                enc += (old_enc[t] + d * x[r * TILES + t].to(tl.float32),)
                dec += (old_dec[t] + v[r] * g[r * TILES + t].to(tl.float32),)
        pair = ahead
        i += R

    out_enc, out_dec, out_b, to = dW_enc, dW_dec, db_enc, p.to(tl.int64)
    if p >= RUNS:
        out_enc, out_dec, out_b, to = part_enc, part_dec, part_b, (p - RUNS).to(tl.int64)
    for t in tl.static_range(TILES):
        c = t * BLOCK + tl.arange(0, BLOCK)
        bias = tl.load(b_dec + c, mask=c < C, other=0.0)
        tl.store(out_enc + to * C + c, enc[t] - b * bias, mask=c < C)
        tl.store(out_dec + to * C + c, dec[t], mask=c < C)
    tl.store(out_b + to, b)


@jit
def _add_parts(first, ends, run_enc, run_dec, run_b, part_enc, part_dec, part_b, dW_enc, dW_dec, db_enc,
               F: tl.constexpr, CHUNKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Add feature f's runs, one a chunk of tokens, and their further parts, in order. A single run has
    its sums in place, and mostly no parts; at most N K / PART rows of 2 C fp32 are read: 50 MB at
    N=32768, K=32, C=768."""
    f = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    enc = tl.zeros([BLOCK], tl.float32)
    dec = tl.zeros([BLOCK], tl.float32)
    b = 0.0
    needed = True
    for chunk in tl.static_range(CHUNKS):
        run = chunk * F + f
        lo = tl.load(first + run)
        hi = tl.load(ends + run)
        needed = (CHUNKS > 1) | (lo < hi)
        live = (c < C) & needed
        at = run.to(tl.int64) * C + c
        enc += tl.load(run_enc + at, mask=live, other=0.0)
        dec += tl.load(run_dec + at, mask=live, other=0.0)
        b += tl.load(run_b + run)
        while lo < hi:
            at = lo.to(tl.int64) * C + c
            enc += tl.load(part_enc + at, mask=c < C, other=0.0)
            dec += tl.load(part_dec + at, mask=c < C, other=0.0)
            b += tl.load(part_b + lo)
            lo += 1
    at = f.to(tl.int64) * C + c
    live = (c < C) & needed
    tl.store(dW_enc + at, enc, mask=live)
    tl.store(dW_dec + at, dec, mask=live)
    tl.store(db_enc + f, b)


@jit
def _pair_keys(values, indices, key, P, per_chunk, F: tl.constexpr, RUNS: tl.constexpr, SHIFT: tl.constexpr,
               BLOCK: tl.constexpr):
    """What _sort_pairs sorts by, for P pairs, per_chunk of them a chunk: ten small kernels in torch."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = tl.load(values + i, mask=i < P, other=0.0) != 0
    run = tl.load(indices + i, mask=i < P, other=0) + i // per_chunk * F
    tl.store(key + i, (tl.where(live, run, RUNS) - SHIFT).to(key.dtype.element_ty), mask=i < P)


def _sort_pairs(values, indices, F, chunks):
    """
    The active (token, slot) pairs in order of run = chunk * F + feature, where tokens are cut into
    equal chunks: order (N K,) int64, where pair n K + k is slot k of token n, and starts
    (chunks F + 1,) int32: a run has order[starts[run] : starts[run + 1]], in order of token, as the
    sort is stable. Pairs whose value is 0 come last.
    Radix sort takes two passes over int16 and four over int32, hence the shift.
    """
    (N, K), runs = values.shape, chunks * F
    shift, dtype = (32768, torch.int16) if runs < 65536 else (0, torch.int32)
    key = torch.empty(N * K, dtype=dtype, device=values.device)
    _pair_keys[(triton.cdiv(N * K, 1024),)](values, indices, key, N * K, triton.cdiv(N, chunks) * K, F=F,
                                            RUNS=runs, SHIFT=shift, BLOCK=1024, num_warps=4)
    key, order = key.sort(stable=True)
    bounds = torch.arange(-shift, runs + 1 - shift, device=key.device, dtype=dtype)
    return order, torch.searchsorted(key, bounds, out_int32=True)


def _weight_grads(gy, gvalues, h, W_dec, b_dec, values, indices):
    """-> dvalues (N, K), dW_enc (F, C), dW_dec (F, C), db_enc (F,), all fp32. gvalues may be None."""
    (N, K), (F, C) = values.shape, W_dec.shape
    chunks = min(2 * h.nbytes / (PAIR_MB * 2**20), N * K / (F * PAIR_MIN), 65535 / F)
    chunks = max(1, int(chunks))
    runs = chunks * F
    order, starts = _sort_pairs(values, indices, F, chunks)
    # Further parts: run r owns numbers first[r] to ends[r] of at most N K / PAIR_PART.
    n_parts = N * K // PAIR_PART
    more = (starts.diff() - 1).div_(PAIR_PART, rounding_mode="trunc")   # 0 for an empty run
    ends = more.cumsum(0, dtype=torch.int32)
    first = ends - more
    owner = torch.searchsorted(ends, torch.arange(n_parts, device=h.device, dtype=torch.int32),
                               right=True, out_int32=True)
    new = lambda n: (torch.empty(n, C, device=h.device), torch.empty(n, C, device=h.device),  # noqa: E731
                     torch.empty(n, device=h.device))   # fp32: of W_enc, W_dec, b_enc
    sums, parts = new(runs), new(n_parts)
    dvalues = torch.zeros_like(values)
    BLOCK = min(triton.next_power_of_2(C), 256 * max(1, triton.next_power_of_2(C) // 1024))
    _pair_sums[(runs + n_parts,)](
        gy, h, values, gvalues, W_dec, b_dec, order, starts, owner, first, dvalues, *sums, *parts,
        F=F, RUNS=runs, C=C, K=K, PART=PAIR_PART, R=PAIR_ROWS, BLOCK=BLOCK, TILES=triton.cdiv(C, BLOCK),
        num_warps=max(1, BLOCK // 256))
    grads = new(F) if chunks > 1 else sums
    if chunks > 1 or n_parts:
        _add_parts[(F,)](first, ends, *sums, *parts, *grads, F=F, CHUNKS=chunks, C=C,
                         BLOCK=triton.next_power_of_2(C), num_warps=4)
    return dvalues, *grads


# ---------------------------------------------------------------------------- matmuls with an epilogue
@jit
def _matmul(a, b, act, bias, out, maxima, M, N: tl.constexpr, K: tl.constexpr, EPILOGUE: tl.constexpr,
            SPAN: tl.constexpr, PROGRAMS: tl.constexpr, EACH: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """
    A matmul that spares the kernel after it a pass over memory. a (M, K), b (N, K), out (M, N):
        relu2      out = relu(a b^T)^2
        backward   out = (a b) 2 sqrt(act), what relu^2 sends back; here b is (K, N)
        maxima     out = a b^T; maxima[m, g] = the largest of SPAN columns of out[m] + bias, fp32

    Bytes: relu^2 in a kernel of its own would read and write 0.8 GB at M=65536, N=3072 in bf16 (0.19
    ms) and its backward 1.2 (0.28); here nothing, and act once. The maxima spare _select the row:
    0.1 GB in place of 1.6 at N=12288. a, b, act and out are tensor descriptors (Hopper's TMA), which
    read zeros and write nothing out of bounds. PROGRAMS programs take EACH tiles in turns, GROUP
    rows of tiles at a time so that they meet in the L2; what is left over at the end is the last
    tile again.
    """
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    in_row: tl.constexpr = (N + SPAN - 1) // SPAN   # maxima
    for turn in tl.range(0, EACH, flatten=True):   # the next tile is loaded while this one is written
        tile = tl.minimum(turn * PROGRAMS + tl.program_id(0), down * across - 1)
        group = tile // (GROUP * across) * GROUP
        rows = tl.minimum(down - group, GROUP)
        at = tile % (GROUP * across)
        m = (group + at % rows) * BM
        n = at // rows * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if EPILOGUE == "backward":
                acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
            else:
                acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
        # in two halves, which need half as much shared memory
        halves = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            half, col = halves[i], n + i * (BN // 2)
            if EPILOGUE == "backward":
                half *= 2 * tl.sqrt(act.load([m, col]).to(tl.float32))
            elif EPILOGUE == "relu2":
                half *= tl.maximum(half, 0.0)   # NaN stays, as NaN * 0
            if out.dtype == tl.bfloat16:   # two at a time; where x needs them too, the compiler takes one, slowly
                half = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [half],
                                                 dtype=tl.bfloat16, is_pure=True, pack=2)
            half = half.to(out.dtype)
            if EPILOGUE == "maxima":   # of what _select will read: rounded
                c = col + tl.arange(0, BN // 2)
                x = half.to(tl.float32) + tl.load(bias + c, mask=c < N, other=0.0)[None, :]
                if N % (BN // 2) != 0:
                    x = tl.where((c < N)[None, :], x, float("-inf"))
                best = tl.reduce(x.reshape(BM, BN // 2 // SPAN, SPAN), 2, _larger)
                r = m + tl.arange(0, BM)
                g = col // SPAN + tl.arange(0, BN // 2 // SPAN)
                tl.store(maxima + r.to(tl.int64)[:, None] * in_row + g[None, :], best,
                         mask=(r < M)[:, None] & (g < in_row)[None, :])
            out.store([m, col], half)


def _fused_matmul(epilogue, a, b, out, tile, act=None, bias=None, maxima=None):
    """Launch _matmul."""
    (M, K), N = a.shape, out.shape[1]
    BM, BN, BK, stages, group = tile
    block = TensorDescriptor.from_tensor
    a, b = block(a, [BM, BK]), block(b, [BK, BN] if epilogue == "backward" else [BN, BK])
    act, to = (t if t is None else block(t, [BM, BN // 2]) for t in (act, out))
    programs = torch.cuda.get_device_properties(out.device).multi_processor_count if out.is_cuda else 2
    each = triton.cdiv(triton.cdiv(M, BM) * triton.cdiv(N, BN), programs)
    _matmul[(programs,)](a, b, act, bias, to, maxima, M, N=N, K=K, EPILOGUE=epilogue, SPAN=SPAN, PROGRAMS=programs,
                         EACH=each, BM=BM, BN=BN, BK=BK, GROUP=group, num_warps=8, num_stages=stages)
    return out


# ---------------------------------------------------------------------------- the layer
INTERPRET = triton is not None and triton.knobs.runtime.interpret   # TRITON_INTERPRET=1, for tests


@torch.compiler.assume_constant_result   # torch.compile asks once
def available(device):
    """True where the kernels run: an NVIDIA GPU from Ampere on, or anywhere in the interpreter."""
    device = torch.device(device)
    return INTERPRET or (triton is not None and device.type == "cuda" and torch.version.hip is None
                         and torch.cuda.get_device_capability(device) >= (8, 0))


@torch.compiler.assume_constant_result
def _hopper(device):
    """True where _matmul runs: it was made for, and measured on, Hopper alone."""
    return INTERPRET or (available(device) and torch.cuda.get_device_capability(device)[0] == 9)


def _fits(n, F, C, k, dtype, device):
    """The kernels' range; everything else takes the reference."""
    return (available(device) and dtype in (torch.float32, torch.bfloat16, torch.float16)
            and n > 0 and k <= MAX_K and C <= MAX_C and n * max(C, k) < 2**31)


def _fits_matmul(x, *widths):
    """x (..., C): where _matmul runs and pays."""
    return (_hopper(x.device) and x.dtype == (torch.float32 if INTERPRET else torch.bfloat16)
            and x.shape[:-1].numel() >= MATMUL_ROWS and all(n % 8 == 0 for n in widths))


@jit
def _fold_b_dec(W_enc, b_enc, b_dec, W, bias, C: tl.constexpr, BLOCK: tl.constexpr):
    """W = W_enc in h's type, and bias = b_enc - W b_dec: so h needs no copy less b_dec (0.2 ms of 118, 124M)."""
    f = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    w = tl.load(W_enc + f * C + c, mask=c < C, other=0.0).to(W.dtype.element_ty)
    tl.store(W + f * C + c, w, mask=c < C)
    dot = tl.sum(w.to(tl.float32) * tl.load(b_dec + c, mask=c < C, other=0.0), axis=0)
    tl.store(bias + f, tl.load(b_enc + f).to(tl.float32) - dot)


@torch.library.custom_op("sae::topk_autoencode", mutates_args=())
def _autoencode(h: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, W_dec: torch.Tensor,
                b_dec: torch.Tensor, k: int,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    h, (N, C), F = h.contiguous(), h.shape, W_enc.shape[0]
    b_dec = b_dec.float().contiguous()
    W, bias = torch.empty(F, C, dtype=h.dtype, device=h.device), torch.empty(F, device=h.device)
    _fold_b_dec[(F,)](W_enc.contiguous(), b_enc.contiguous(), b_dec, W, bias, C=C,
                      BLOCK=triton.next_power_of_2(C), num_warps=4)
    values = torch.empty(N, k, device=h.device)
    indices = torch.empty(N, k, device=h.device, dtype=torch.int32)
    fired = torch.zeros(F, device=h.device, dtype=torch.uint8)
    rows = max(256, BUFFER_MB * 2**20 // (F * h.element_size()))
    rows = min(N, 1 << (rows.bit_length() - 1))
    buffer = torch.empty(rows, F, dtype=h.dtype, device=h.device)
    fused = _fits_matmul(h, C, F) and 2 * SPAN * k <= F <= 2**17   # few K and groups, or _select's lists grow long
    with torch.autocast(h.device.type, enabled=False):
        for i in range(0, N, rows):
            j = min(i + rows, N)
            pre, maxima = buffer[:j - i], None
            if fused:
                maxima = torch.empty(j - i, triton.cdiv(F, SPAN), device=h.device)
                _fused_matmul("maxima", h[i:j], W, pre, ENCODER_TILE, bias=bias, maxima=maxima)
            else:
                torch.mm(h[i:j], W.t(), out=pre)
            _select_rows(pre, bias, values[i:j], indices[i:j], fired, maxima)
    del buffer, W
    y = _gather(values, indices, W_dec.to(h.dtype).contiguous(), b_dec, h.dtype)
    return y, values, indices, fired.view(torch.bool)


@_autoencode.register_fake
def _(h, W_enc, b_enc, W_dec, b_dec, k):
    N = h.shape[0]
    return (torch.empty_like(h, memory_format=torch.contiguous_format),
            h.new_empty(N, k, dtype=torch.float32), h.new_empty(N, k, dtype=torch.int32),
            h.new_empty(W_enc.shape[0], dtype=torch.bool))


@torch.library.custom_op("sae::topk_autoencode_backward", mutates_args=())
def _autoencode_backward(
        gy: torch.Tensor, gvalues: torch.Tensor | None, h: torch.Tensor, W_enc: torch.Tensor,
        W_dec: torch.Tensor, b_dec: torch.Tensor, values: torch.Tensor, indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    h = h.contiguous()
    gy = gy.to(h.dtype).contiguous()
    gvalues = None if gvalues is None else gvalues.float().contiguous()
    with torch.autocast(h.device.type, enabled=False):
        dvalues, dW_enc, dW_dec, db_enc = _weight_grads(
            gy, gvalues, h, W_dec.contiguous(), b_dec.float().contiguous(), values, indices)
        dh = _gather(dvalues, indices, W_enc.to(h.dtype).contiguous(), None, h.dtype)
    return dh, dW_enc.to(W_enc.dtype), db_enc, dW_dec.to(W_dec.dtype)


@_autoencode_backward.register_fake
def _(gy, gvalues, h, W_enc, W_dec, b_dec, values, indices):
    empty = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)  # noqa: E731
    return empty(h), empty(W_enc), values.new_empty(W_enc.shape[0]), empty(W_dec)


def _setup(ctx, inputs, output):
    h, W_enc, b_enc, W_dec, b_dec, _ = inputs
    ctx.set_materialize_grads(False)   # mostly only y is used: then the values' gradient is None
    ctx.bias_types = b_enc.dtype, b_dec.dtype
    ctx.save_for_backward(h, W_enc, W_dec, b_dec, *output[1:3])


def _backward(ctx, gy, gvalues, *_):
    if gy is None:
        gy = torch.zeros_like(ctx.saved_tensors[0])
    W_enc = ctx.saved_tensors[1]
    dh, dW_enc, db_enc, dW_dec = _autoencode_backward(gy, gvalues, *ctx.saved_tensors)
    # h - b_dec sends back minus the sum of dh over tokens, which is W_enc^T db_enc
    db_dec = gy.sum(0, dtype=torch.float32) - (db_enc[:, None] * W_enc).sum(0)
    return dh, dW_enc, db_enc.to(ctx.bias_types[0]), dW_dec, db_dec.to(ctx.bias_types[1]), None


_autoencode.register_autograd(_backward, setup_context=_setup)


def topk_autoencode(h, W_enc, b_enc, W_dec, b_dec, k):
    """
    The SAE layer: h (N, C) -> y (N, C) in h's dtype, values (N, k) fp32 and indices (N, k), sorted
    from the largest value down, ties by lowest index; and fired (F,) bool, which features are
    active for any token. Differentiable in y and values, for all five tensors. A slot beyond a
    token's positive activations has value 0, names a feature that is not active, and gets no
    gradient. NaN in a row of h gives NaN in that row of y.
    Under autocast pass h in the autocast dtype; the parameters may stay fp32.
    Kernels: N > 0, k <= 512, C <= 4096, h in fp32, bf16 or fp16; else the reference.
    """
    if not 1 <= k <= W_enc.shape[0]:
        raise ValueError(f"k is {k}; it must be from 1 to the number of features, {W_enc.shape[0]}")
    fits = _fits(h.shape[0], *W_enc.shape, k, h.dtype, h.device)
    return (_autoencode if fits else topk_autoencode_ref)(h, W_enc, b_enc, W_dec, b_dec, k)


def topk(pre, b_enc, k):
    """The selection on its own, without gradient: pre (N, F), b_enc (F,) -> values (N, k) fp32 and
    indices (N, k) int32 of relu(pre + b_enc), exactly as topk_ref orders them."""
    N, F = pre.shape
    if not 1 <= k <= F:
        raise ValueError(f"k is {k}; it must be from 1 to the number of features, {F}")
    if not _fits(N, F, 1, k, pre.dtype, pre.device):
        return topk_ref(pre, b_enc, k)
    values = torch.empty(N, k, device=pre.device)
    indices = torch.empty(N, k, device=pre.device, dtype=torch.int32)
    fired = torch.zeros(F, device=pre.device, dtype=torch.uint8)
    _select_rows(pre.detach().contiguous(), b_enc.detach().float().contiguous(), values, indices,
                 fired)
    return values, indices


# ---------------------------------------------------------------------------- MLP
def mlp_ref(x, W_fc, W_proj):
    """relu(x W_fc^T)^2 W_proj^T in plain PyTorch with autograd; same arguments and result as mlp."""
    return F_.linear(torch.relu(F_.linear(x, W_fc.to(x.dtype))).square(), W_proj.to(x.dtype))


@torch.library.custom_op("sae::mlp", mutates_args=())
def _mlp(x: torch.Tensor, W_fc: torch.Tensor, W_proj: torch.Tensor,
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the result and act, the hidden layer."""
    x = x.contiguous()
    act = x.new_empty(len(x), len(W_fc))
    _fused_matmul("relu2", x, W_fc.to(x.dtype).contiguous(), act, MLP_TILE)
    return act @ W_proj.to(x.dtype).t(), act


@_mlp.register_fake
def _(x, W_fc, W_proj):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], W_fc.shape[0])


@torch.library.custom_op("sae::mlp_backward", mutates_args=())
def _mlp_backward(g: torch.Tensor, x: torch.Tensor, act: torch.Tensor, W_fc: torch.Tensor,
                  W_proj: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g, x = g.to(x.dtype).contiguous(), x.contiguous()
    dpre = _fused_matmul("backward", g, W_proj.to(x.dtype).contiguous(), torch.empty_like(act), MLP_TILE, act=act)
    dW_fc, dW_proj = (dpre.t() @ x).to(W_fc.dtype), (g.t() @ act).to(W_proj.dtype)
    return dpre @ W_fc.to(x.dtype), dW_fc, dW_proj


@_mlp_backward.register_fake
def _(g, x, act, W_fc, W_proj):
    return x.new_empty(x.shape), torch.empty_like(W_fc), torch.empty_like(W_proj)


def _setup_mlp(ctx, inputs, output):
    ctx.set_materialize_grads(False)   # act's: nothing uses it outside
    x, W_fc, W_proj = inputs
    ctx.save_for_backward(x, output[1], W_fc, W_proj)


_mlp.register_autograd(lambda ctx, g, _: _mlp_backward(g, *ctx.saved_tensors), setup_context=_setup_mlp)


def mlp(x, W_fc, W_proj):
    """
    A GPT's MLP: relu(x W_fc^T)^2 W_proj^T, x (..., C), W_fc (4C, C), W_proj (C, 4C) -> (..., C).
    Differentiable, once, in all three. Under autocast pass x in the autocast dtype; the weights may
    stay fp32. Kernel: bf16 on Hopper, 1024 tokens or more, widths that are multiples of 8; else the
    reference.
    """
    if not _fits_matmul(x, *W_fc.shape):
        return mlp_ref(x, W_fc, W_proj)
    return _mlp(x.flatten(0, -2), W_fc, W_proj)[0].view_as(x)


# ---------------------------------------------------------------------------- head and loss
def linear_cross_entropy_ref(x, W, targets, vocab_size):
    """Logits and loss in plain PyTorch with autograd; same arguments and result as below."""
    logits = F_.linear(x, W.to(x.dtype))[:, :vocab_size]                    # (N, V)
    return F_.cross_entropy(logits.float(), targets)


@jit
def _softmax_loss(logits, targets, losses, scale, V: tl.constexpr, V_PAD: tl.constexpr,
                  BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """
    One row of logits -> its loss and (GRAD), in place, scale (softmax - onehot), 0 in the padding.

    Bytes: each logit once from memory, once from the L2, and written once: 6.6 GB at N=32768,
    V=50304 in bf16, 2.2 ms at 3 TB/s. One exp a logit and pass: the maximum is the row's so far, a
    scalar, so that rescaling the sums takes one more exp a block, not one a logit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V_PAD
    top = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)   # a sum a column: added up once, at the end
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        # the mask V_PAD keeps 8 logits a load: by GPT-2's odd V it would be one (seen in the PTX)
        a = tl.load(logits + c, mask=c < V_PAD, other=0.0).to(tl.float32)
        a = tl.where(c < V, a, float("-inf"))
        new_top = tl.maximum(top, tl.max(a, axis=0))
        total = total * tl.exp(top - new_top) + tl.exp(a - new_top)   # a NaN stays in the sum
        top = new_top
    lse = top + tl.log(tl.sum(total, axis=0))
    target = tl.load(targets + row)
    ok = (target >= 0) & (target < V)
    at = tl.load(logits + target, mask=ok, other=float("nan")).to(tl.float32)
    tl.store(losses + row, lse - at)
    if GRAD:
        tl.debug_barrier()   # every warp has read `at` before one of them overwrites it
        for start in range(0, V_PAD, BLOCK):
            c = start + tl.arange(0, BLOCK)
            a = tl.load(logits + c, mask=c < V_PAD, other=0.0).to(tl.float32)
            d = scale * (tl.exp(a - lse) - tl.where(c == target, 1.0, 0.0))
            d = tl.where(c < V, d, 0.0)
            tl.store(logits + c, d.to(logits.dtype.element_ty), mask=c < V_PAD)


@torch.library.custom_op("sae::linear_cross_entropy", mutates_args=())
def _linear_loss(x: torch.Tensor, W: torch.Tensor, targets: torch.Tensor, vocab_size: int,
                 grads: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss and, where grads are wanted, its gradients for x and W: the forward pass has the
    logits in hand, and what they leave behind is 16 times smaller (N=32768: 0.2 GB, not 3.3)."""
    x, targets, W_x = x.contiguous(), targets.contiguous(), W.to(x.dtype).contiguous()
    N, V_PAD = x.shape[0], W.shape[0]
    rows = max(1, int(LOGITS_MB * 2**20 / (V_PAD * x.element_size())))
    rows = min(N, 1 << (rows.bit_length() - 1))
    buffer = torch.empty(rows, V_PAD, dtype=x.dtype, device=x.device)
    losses = torch.empty(N, device=x.device)
    dx = torch.empty(x.shape if grads else 0, dtype=x.dtype, device=x.device)
    dW = torch.empty(W.shape if grads else 0, device=x.device)
    BLOCK = min(LOSS_BLOCK, triton.next_power_of_2(V_PAD))
    with torch.autocast(x.device.type, enabled=False):
        for i in range(0, N, rows):
            j = min(i + rows, N)
            logits = torch.mm(x[i:j], W_x.t(), out=buffer[:j - i])          # (rows, V_PAD)
            _softmax_loss[(j - i,)](
                logits, targets[i:j], losses[i:j], 1 / N, V=vocab_size, V_PAD=V_PAD,
                BLOCK=BLOCK, GRAD=grads, num_warps=max(1, min(LOSS_WARPS, BLOCK // 32)))
            if grads:   # the buffer holds d loss / d logits now
                torch.mm(logits, W_x, out=dx[i:j])
                a, b, beta = logits.t(), x[i:j], int(i > 0)   # 0: dW is not read
                if x.is_cuda and x.dtype == torch.bfloat16:   # bf16 into fp32 sums: cuBLAS only
                    torch.addmm(dW, a, b, beta=beta, out=dW, out_dtype=torch.float32)
                else:
                    torch.addmm(dW, a.float(), b.float(), beta=beta, out=dW)
    return losses.mean(), dx, dW.to(W.dtype)


@_linear_loss.register_fake
def _(x, W, targets, vocab_size, grads):
    like = [t.new_empty(t.shape if grads else 0) for t in (x, W)]
    return x.new_empty((), dtype=torch.float32), *like


def _setup_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)   # dx and dW are outputs as well: make no zeros for them
    ctx.save_for_backward(*output[1:])


def _backward_loss(ctx, g, *_):
    dx, dW = ctx.saved_tensors         # .float(): else g would be rounded to dx's dtype first
    return (dx.float() * g).to(dx.dtype), (dW.float() * g).to(dW.dtype), None, None, None


_linear_loss.register_autograd(_backward_loss, setup_context=_setup_loss)


def linear_cross_entropy(x, W, targets, vocab_size):
    """
    Mean cross-entropy in nats, an fp32 scalar, of the logits x W^T: x (N, C), W (V', C), targets
    (N,) int64. Rows of W from vocab_size on pad it and do not count. Differentiable, once, in x
    and W. NaN in x gives NaN; on the kernels a target outside the vocabulary, -100 too, does so.
    Under autocast pass x in the autocast dtype; W may stay fp32.
    Kernels: N > 0, x in fp32 or bf16 (fp16 would lose gradients of 1/N); else the reference.
    """
    if not (available(x.device) and x.dtype in (torch.float32, torch.bfloat16) and x.shape[0] > 0):
        return linear_cross_entropy_ref(x, W, targets, vocab_size)
    grads = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return _linear_loss(x, W, targets, vocab_size, grads)[0]
