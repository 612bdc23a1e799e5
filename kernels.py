"""
Three fast paths on a GPU, in Triton: topk_autoencode, one SAE layer, whose plain path is sae.py's;
mlp, a block's MLP; linear_cross_entropy, the output head and the loss. These two compute in plain
PyTorch where there is no Triton or no GPU.

Of the SAE layer only the encoder's product is dense. The rest touches K of F features a token:
    forward   cuBLAS, or on Hopper _matmul, writes the product of some rows to a small buffer;
              _select finds each row's K largest, _gather_sum adds K rows of W_dec, _sort_pairs
              sorts the active (feature, token) pairs by feature
    backward  _pair_sums walks each feature's tokens for d values, dW_dec, dW_enc and db_enc
              together; _gather_sum adds K rows of W_enc for dh
Nothing of size (N, F) is kept for backward. No atomics: sums run in a fixed order, so two runs on
one card agree to the bit.

Shapes: N tokens (= B*T), C n_embd, F features, K active features a token.
W_enc (F, C), b_enc (F,), W_dec (F, C), b_dec (C,).
"""
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    jit = triton.jit
except ImportError:  # no Triton (CPU wheels, macOS): keep the kernels' names, never launch them
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda fn: fn

INTERPRET = triton is not None and triton.knobs.runtime.interpret   # TRITON_INTERPRET=1, for tests
MAX_K, MAX_C = 512, 4096   # held in registers: _select's final sort, three rows in _pair_sums

# Launch shapes: the fastest in sweeps of one at a time, in bf16 at GPT-2's size, on one H200.
# Only PAIR_PART touches results: how sums round.
BUFFER_MB = 1024     # the encoder's output, hence how many rows at a time
PAIR_PART = 128      # pairs a program of _pair_sums; busier features are split
# _matmul's tiles M, N, K, how many are in flight, and rows of tiles at a time
MLP_TILE = 128, 256, 64, 3, 8
ENCODER_TILE = 128, 256, 64, 4, 16
SPAN = 64            # columns a maximum
MATMUL_ROWS = 1024   # fewer tokens, as in sampling, are left to cuBLAS
LOGITS_MB = 2048     # the logits, hence how many rows at a time
LOSS_BLOCK = 2048    # columns in registers at once

# ---------------------------------------------------------------------------- where kernels run
def available(device):
    """True where the kernels run: an NVIDIA GPU from Ampere on, or anywhere in the interpreter."""
    device = torch.device(device)
    return INTERPRET or (triton is not None and device.type == "cuda" and torch.version.hip is None
                         and torch.cuda.get_device_capability(device) >= (8, 0))

def _hopper(device):
    """True where _matmul runs: it was made for, and measured on, Hopper alone."""
    return INTERPRET or (available(device) and torch.cuda.get_device_capability(device)[0] == 9)

for fn in available, _hopper:   # torch.compile asks once; assume_constant_result does no more than
    fn._dynamo_marked_constant = True   # this, but loads the compiler, two seconds for each view

def fits(n, F, C, k, dtype, device):
    """True where topk_autoencode takes n tokens of C channels in dtype; else use the plain path."""
    return (available(device) and dtype in (torch.float32, torch.bfloat16, torch.float16)
            and n > 0 and 1 <= k <= min(F, MAX_K) and C <= MAX_C and n * max(C, k) < 2**31)

def _fits_matmul(x, *widths):
    """x (..., C): where _matmul runs and pays."""
    return (_hopper(x.device) and x.dtype == (torch.float32 if INTERPRET else torch.bfloat16)
            and x.shape[:-1].numel() >= MATMUL_ROWS and all(n % 8 == 0 for n in widths))

def _slices(N, row_bytes, mb):
    """N rows in slices of about mb MB: a power of two of rows each, the last one shorter."""
    rows = max(1, int(mb * 2**20 / row_bytes))
    rows = 1 << (rows.bit_length() - 1)
    return [slice(i, min(i + rows, N)) for i in range(0, N, rows)]

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
def _collect(pre, b_enc, groups, n_groups, found, above, F: tl.constexpr, G: tl.constexpr,
             EIGHTS: tl.constexpr, LIST: tl.constexpr, CAP: tl.constexpr):
    """Write the listed groups' entries > above (int64; int32: whose key is) to found, CAP at most
    -> how many there are. An entry is key << 32 | (2^31 - 1 - index): the best is the largest."""
    n = 0
    for start in range(0, F, 8 * EIGHTS * G):
        first = 0
        while first < n_groups * EIGHTS:
            slot = first + tl.arange(0, LIST)
            first += LIST
            listed = slot < n_groups * EIGHTS
            group = tl.load(groups + slot // EIGHTS, mask=listed, other=F)   # F: out of the row
            i = start + (group * EIGHTS + slot % EIGHTS)[:, None] * 8 + tl.arange(0, 8)[None, :]
            a = tl.load(pre + i, mask=i < F, other=float("-inf")).to(tl.float32)
            key = _key(a + tl.load(b_enc + i, mask=i < F, other=0.0))
            entry = (key.to(tl.int64) << 32) | (0x7FFFFFFF - i)
            hit = ((key if above.dtype == tl.int32 else entry) > above).to(tl.int32)
            each = tl.sum(hit, axis=1)
            before = tl.cumsum(each, axis=0) - each
            at = n + before[:, None] + tl.cumsum(hit, axis=1) - hit
            tl.store(found + at, entry, mask=(hit == 1) & (at < CAP))
            n += tl.sum(each, axis=0)
    return n

@jit
def _select(pre, b_enc, maxima, values, indices, groups, found, F: tl.constexpr, K: tl.constexpr,
            KP: tl.constexpr, G: tl.constexpr, EIGHTS: tl.constexpr, CAP: tl.constexpr):
    """
    One row of pre (fp32 sum with b_enc, relu) -> its K largest, exactly, ties by lowest index.

    Bytes: the row once, 0.8 GB at N=32768, F=12288 in bf16. To bisect it all is slower, so
    1. one maximum for each of G groups (8 adjacent elements in every slab of 8 G), or, from the
       encoder, of 8 EIGHTS adjacent elements, so that the row itself is not read;
    2. the K-th largest of the G maxima bounds the row's K-th largest from below, and only groups
       whose maximum reaches it can hold one of the K: list them (about K of G);
    3. read only these again and keep what reaches the bound: with G = 8 K about 1.07 K elements;
    4. more than CAP kept (the large ones crowded in few groups, or many ties): bisect for a bound
       that K to CAP of them pass. Always right, merely slower;
    5. sort what is kept.
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
            a = tl.load(pre + i, mask=i < F, other=float("-inf"), cache_modifier=".cg")
            a = a.to(tl.float32) + tl.load(b_enc + i, mask=i < F, other=0.0)
            best = _larger(best, tl.reduce(a, 1, _larger))
    else:
        in_row: tl.constexpr = (F + 8 * EIGHTS - 1) // (8 * EIGHTS)
        best = tl.load(maxima + row * in_row + g, mask=g < in_row, other=0.0)
    best_key = _key(best)

    # 2. bisect for the largest bound that at least K maxima reach; any with exactly K will do
    top = tl.max(best_key, axis=0)
    bound = top * 0
    most = top
    reach = bound + G
    while (reach != K) & (bound < most):
        mid = most - (most - bound) // 2
        count = tl.sum((best_key >= mid).to(tl.int32), axis=0)
        reach = tl.where(count >= K, count, reach)
        bound = tl.where(count >= K, mid, bound)
        most = tl.where(count >= K, most, mid - 1)
    bound = tl.maximum(bound, 1)
    listed = (best_key >= bound).to(tl.int32)
    n_groups = tl.sum(listed, axis=0)
    tl.store(groups + tl.cumsum(listed, axis=0) - 1, g, mask=listed == 1)
    tl.debug_barrier()

    # 3. what reaches the bound
    n = _collect(pre, b_enc, groups, n_groups, found, bound - 1, F, G, EIGHTS, KP, CAP)

    # 4. too many: a higher bound. All entries differ, so one can be met by K to CAP of them
    lo = (bound.to(tl.int64) << 32) - 1
    hi = (top.to(tl.int64) << 32) | 0x7FFFFFFF
    while n > CAP:
        tl.debug_barrier()   # the next entries take the place of the last ones
        middle = lo + ((hi - lo) >> 1)
        count = _collect(pre, b_enc, groups, n_groups, found, middle, F, G, EIGHTS, KP, CAP)
        n = tl.where(count >= K, count, n)
        lo = tl.where(count >= K, middle, lo)
        hi = tl.where(count >= K, hi, middle)
    tl.debug_barrier()

    # 5. sort; from slot n on values are 0, of feature 0
    slot = tl.arange(0, CAP)
    entry = tl.sort(tl.load(found + slot, mask=slot < n, other=0), descending=True)
    value = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    index = tl.where(slot < n, 0x7FFFFFFF - (entry & 0x7FFFFFFF).to(tl.int32), 0)
    tl.store(values + row * K + slot, value, mask=slot < K)
    tl.store(indices + row * K + slot, index, mask=slot < K)

def select(pre, b_enc, values, indices, maxima=None):
    """
    The K largest of each row of relu(pre + b_enc), NaN first: fills values and indices (n, K) as
    topk_autoencode returns them. pre (n, F), contiguous; b_enc (F,) fp32; maxima
    (n, ceil(F / SPAN)) fp32: what _matmul's epilogue found.
    """
    (n, F), K = pre.shape, values.shape[1]
    KP = triton.next_power_of_2(K)
    if maxima is None:
        G, eights = min(max(128, 8 * KP), triton.next_power_of_2(F) // 8), 1
    else:
        G, eights = triton.next_power_of_2(maxima.shape[1]), SPAN // 8
    G = max(KP, G)   # fewer than K groups have no K-th largest maximum
    CAP = 2 * KP
    groups = torch.empty(n, G, dtype=torch.int32, device=pre.device)
    found = torch.empty(n, CAP, dtype=torch.int64, device=pre.device)
    _select[(n,)](pre, b_enc, maxima, values, indices, groups, found, F=F, K=K, KP=KP, G=G,
                  EIGHTS=eights, CAP=CAP, num_warps=max(1, KP // 64))   # one warp needs no barriers

# ---------------------------------------------------------------------------- gathers
@jit
def _gather_sum(coef, index, W, bias, out, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
                BLOCK: tl.constexpr):
    """
    out[n] = sum_k coef[n, k] W[index[n, k]] (+ bias): the decoder, and dh with W_enc.

    Bytes: N K C of W's type, 1.6 GB at N=32768, K=32, C=768 in bf16, but W (19 MB at F=12288) lives
    in the L2. One program is one warp: BLOCK columns of one token. Slots with coef 0 are not read.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        acc += tl.load(bias + c, mask=c < C, other=0.0)
    for k0 in range(0, K, R):
        k = k0 + tl.arange(0, R)
        a = tl.load(coef + n * K + k, mask=k < K, other=0.0)
        f = tl.load(index + n * K + k, mask=k < K, other=0).to(tl.int64)
        live = (a != 0)[:, None] & (c < C)[None, :]
        w = tl.load(W + f[:, None] * C + c[None, :], mask=live, other=0.0)
        acc += tl.sum(a[:, None] * w.to(tl.float32), axis=0)
    tl.store(out + n * C + c, acc.to(out.dtype.element_ty), mask=c < C)

def _gather(coef, index, W, bias, dtype):
    """Launch _gather_sum: coef and index (N, K), W (F, C), bias (C,) or None -> (N, C) in dtype."""
    (N, K), C = coef.shape, W.shape[1]
    out = torch.empty(N, C, dtype=dtype, device=W.device)
    BLOCK = min(256, triton.next_power_of_2(C))   # one warp: 32 lanes times 16 bytes of bf16
    grid = N, triton.cdiv(C, BLOCK)
    _gather_sum[grid](coef, index, W, bias, out, C=C, K=K, R=16, BLOCK=BLOCK, num_warps=1)
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
def _pair_sums(gy, h, values, gvalues, W_dec, order, starts, owner, first,
               dvalues, sum_enc, sum_dec, sum_b, F: tl.constexpr, RUNS: tl.constexpr,
               C: tl.constexpr, K: tl.constexpr, PART: tl.constexpr, R: tl.constexpr,
               BLOCK: tl.constexpr, TILES: tl.constexpr):
    """
    All that one feature f sends back, over a run of pairs (token n, slot k) where it is active:

        dv = gy[n] . W_dec[f] + gvalues[n, k]         dvalues[n, k] = dv, for dh later
        dW_dec[f] = sum v gy[n]     dW_enc[f] = sum dv h[n]     db_enc[f] = sum dv

    Bytes: gy and h are gathered once (2 N K C of bf16: 3.2 GB at N=32768, K=32, C=768, most of it
    L2 hits as neighbouring programs meet the same tokens); W_dec[f] and both sums are in registers.
    Program p < RUNS takes the first PART pairs of run p, which is feature p % F in one chunk of
    tokens (see _sort_pairs). Some features fire on a third of all tokens, so the rest is cut into
    further parts, programs RUNS + e, whose sums _add_parts adds in order.
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

    # a row of C is TILES blocks, in tuples: C = 768 is not a power of two, and a block of 1024 on
    # four warps would leave one idle and need barriers for the dot product
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

    at = p.to(tl.int64) * C
    for t in tl.static_range(TILES):
        c = t * BLOCK + tl.arange(0, BLOCK)
        tl.store(sum_enc + at + c, enc[t], mask=c < C)
        tl.store(sum_dec + at + c, dec[t], mask=c < C)
    tl.store(sum_b + p, b)

@jit
def _add_parts(first, ends, sum_enc, sum_dec, sum_b, dW_enc, dW_dec, db_enc, F: tl.constexpr,
               CHUNKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """
    Add feature f's runs, one a chunk of tokens, and their further parts, in order. At most N K /
    PART rows of 2 C fp32 are parts: 50 MB at N=32768, K=32, C=768.
    """
    f = tl.program_id(0)
    if (tl.load(first + f) == tl.load(ends + f)) & (CHUNKS == 1):
        return   # the sums of a single run are in place
    c = tl.arange(0, BLOCK)
    live = c < C
    enc = tl.zeros([BLOCK], tl.float32)
    dec = tl.zeros([BLOCK], tl.float32)
    b = 0.0
    for chunk in tl.static_range(CHUNKS):
        run = chunk * F + f
        at = run.to(tl.int64) * C + c
        enc += tl.load(sum_enc + at, mask=live, other=0.0)
        dec += tl.load(sum_dec + at, mask=live, other=0.0)
        b += tl.load(sum_b + run)
        part = CHUNKS * F + tl.load(first + run)
        end = CHUNKS * F + tl.load(ends + run)
        while part < end:
            at = part.to(tl.int64) * C + c
            enc += tl.load(sum_enc + at, mask=live, other=0.0)
            dec += tl.load(sum_dec + at, mask=live, other=0.0)
            b += tl.load(sum_b + part)
            part += 1
    at = f.to(tl.int64) * C + c
    tl.store(dW_enc + at, enc, mask=live)
    tl.store(dW_dec + at, dec, mask=live)
    tl.store(db_enc + f, b)

def _chunks(h, F, k):
    """How many chunks of tokens _pair_sums walks in turn: of 33 MB of h and gy, which then stay in
    the L2, but not of fewer than 56 pairs a feature; and chunks F fits 16 bits where F does."""
    size = 2 * h.numel() * h.element_size()
    return max(1, min(size // (33 * 2**20), h.shape[0] * k // (56 * F), 65535 // F))

@jit
def _pair_keys(values, indices, key, P, per_chunk, F: tl.constexpr, RUNS: tl.constexpr,
               SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """What _sort_pairs sorts P pairs by, per_chunk of them a chunk: many kernels in torch."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = tl.load(values + i, mask=i < P, other=0.0) != 0
    run = tl.load(indices + i, mask=i < P, other=0) + i // per_chunk * F
    tl.store(key + i, (tl.where(live, run, RUNS) - SHIFT).to(key.dtype.element_ty), mask=i < P)

def _sort_pairs(values, indices, F, chunks):
    """
    The active (token, slot) pairs in order of run = chunk * F + feature, where tokens are cut into
    equal chunks: order (N K,) int64, where pair n K + k is slot k of token n, and starts
    (chunks F + 1,) int32: a run has order[starts[run] : starts[run + 1]], by token, as the sort is
    stable. Pairs of value 0 come last. int16 takes half of int32's radix passes: hence the shift.
    """
    (N, K), runs = values.shape, chunks * F
    shift, dtype = (32768, torch.int16) if runs < 65536 else (0, torch.int32)
    key = torch.empty(N * K, dtype=dtype, device=values.device)
    _pair_keys[(triton.cdiv(N * K, 1024),)](
        values, indices, key, N * K, triton.cdiv(N, chunks) * K, F=F, RUNS=runs, SHIFT=shift,
        BLOCK=1024, num_warps=4)
    key, order = key.sort(stable=True)
    bounds = torch.arange(-shift, runs + 1 - shift, device=key.device, dtype=dtype)
    return order, torch.searchsorted(key, bounds, out_int32=True)

# ---------------------------------------------------------------------------- matmuls with more
@jit
def _matmul(a, b, act, bias, out, maxima, M, N: tl.constexpr, K: tl.constexpr,
            EPILOGUE: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, EACH: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """
    A matmul that spares the kernel after it a pass over memory. a (M, K), b (N, K), out (M, N):
        relu2      out = relu(a b^T)^2
        backward   out = (a b) 2 sqrt(act), what relu^2 sends back; here b is (K, N)
        maxima     out = a b^T; maxima[m, g] = the largest of SPAN columns of out[m] + bias, fp32

    Bytes: relu^2 in a kernel of its own would read and write 0.8 GB at M=65536, N=3072 in bf16, its
    backward 1.2. The maxima spare _select the row: 0.1 GB in place of 1.6 at N=12288.
    a, b, act, out: descriptors (Hopper's TMA), which read zeros and write nothing out of bounds.
    PROGRAMS programs take EACH tiles in turns, GROUP rows of tiles at a time, which so meet in the
    L2; spare turns do the last tile again.
    """
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    in_row: tl.constexpr = (N + SPAN - 1) // SPAN   # maxima
    for turn in tl.range(0, EACH, flatten=True):   # loads the next tile while this one is written
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
            if out.dtype == tl.bfloat16:   # two at a time: left to the compiler it is one, slowly
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
    (M, K), N = a.shape, out.shape[1]
    BM, BN, BK, stages, group = tile
    block = TensorDescriptor.from_tensor
    a, b = block(a, [BM, BK]), block(b, [BK, BN] if epilogue == "backward" else [BN, BK])
    act, to = (t if t is None else block(t, [BM, BN // 2]) for t in (act, out))
    programs = 2   # in the interpreter
    if out.is_cuda:
        programs = torch.cuda.get_device_properties(out.device).multi_processor_count
    each = triton.cdiv(triton.cdiv(M, BM) * triton.cdiv(N, BN), programs)
    _matmul[(programs,)](
        a, b, act, bias, to, maxima, M, N=N, K=K, EPILOGUE=epilogue, SPAN=SPAN, PROGRAMS=programs,
        EACH=each, BM=BM, BN=BN, BK=BK, GROUP=group, num_warps=8, num_stages=stages)
    return out

# ---------------------------------------------------------------------------- the layer
@torch.library.custom_op("sae::topk_autoencode", mutates_args=())
def _autoencode(h: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int,
                ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y, values, indices, fired; and _sort_pairs' order and starts, for the backward pass."""
    h, (N, C), F = h.contiguous(), h.shape, W_enc.shape[0]
    W, b_enc = W_enc.to(h.dtype).contiguous(), b_enc.float().contiguous()
    values = torch.empty(N, k, device=h.device)
    indices = torch.empty(N, k, device=h.device, dtype=torch.int32)
    slices = _slices(N, F * h.element_size(), BUFFER_MB)
    buffer = torch.empty(slices[0].stop, F, dtype=h.dtype, device=h.device)
    # few K and groups, or _select's lists grow long
    fused = _fits_matmul(h, C, F) and 2 * SPAN * k <= F <= 2**17
    for s in slices:
        pre, maxima = buffer[:s.stop - s.start], None                       # (rows, F)
        if fused:
            maxima = torch.empty(len(pre), triton.cdiv(F, SPAN), device=h.device)
            _fused_matmul("maxima", h[s], W, pre, ENCODER_TILE, bias=b_enc, maxima=maxima)
        else:
            torch.mm(h[s], W.t(), out=pre)   # autocast leaves what has an out= alone
        select(pre, b_enc, values[s], indices[s], maxima)
    del buffer, pre, W   # room for what follows
    b_dec = b_dec.float().contiguous()
    y = _gather(values, indices, W_dec.to(h.dtype).contiguous(), b_dec, h.dtype)
    chunks = _chunks(h, F, k)
    order, starts = _sort_pairs(values, indices, F, chunks)
    fired = starts.diff().view(chunks, F).sum(0, dtype=torch.int32)
    return y, values, indices, fired, order, starts

@_autoencode.register_fake
def _(h, W_enc, b_enc, W_dec, b_dec, k):
    N, F = h.shape[0], W_enc.shape[0]
    values, order = h.new_empty(N, k, dtype=torch.float32), h.new_empty(N * k, dtype=torch.int64)
    ints = (N, k), (F,), (_chunks(h, F, k) * F + 1,)
    indices, fired, starts = [h.new_empty(shape, dtype=torch.int32) for shape in ints]
    return h.new_empty(h.shape), values, indices, fired, order, starts

@torch.library.custom_op("sae::topk_autoencode_backward", mutates_args=())
def _autoencode_backward(
        gy: Tensor, gvalues: Tensor | None, h: Tensor, W_enc: Tensor, W_dec: Tensor,
        values: Tensor, indices: Tensor, order: Tensor, starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dh, dW_enc, db_enc, dW_dec."""
    (N, K), (F, C), runs = values.shape, W_dec.shape, len(starts) - 1
    h, W_dec = h.contiguous(), W_dec.contiguous()
    gy = gy.to(h.dtype).contiguous()
    gvalues = None if gvalues is None else gvalues.float().contiguous()
    # Further parts: run r owns numbers first[r] to ends[r] of at most N K / PAIR_PART.
    n_parts = N * K // PAIR_PART
    more = (starts.diff() - 1).div_(PAIR_PART, rounding_mode="trunc")   # 0 for an empty run
    ends = more.cumsum(0, dtype=torch.int32)
    first = ends - more
    numbers = torch.arange(n_parts, device=h.device, dtype=torch.int32)
    owner = torch.searchsorted(ends, numbers, right=True, out_int32=True)

    def new(n):   # fp32: of W_enc, W_dec, b_enc
        return [torch.empty(shape, device=h.device) for shape in ((n, C), (n, C), (n,))]
    sums = new(runs + n_parts)
    dvalues = torch.zeros_like(values)
    WIDE = triton.next_power_of_2(C)
    BLOCK = min(WIDE, 256 * max(1, WIDE // 1024))
    _pair_sums[(runs + n_parts,)](
        gy, h, values, gvalues, W_dec, order, starts, owner, first, dvalues, *sums,
        F=F, RUNS=runs, C=C, K=K, PART=PAIR_PART, R=3, BLOCK=BLOCK, TILES=triton.cdiv(C, BLOCK),
        num_warps=max(1, BLOCK // 256))
    grads = new(F) if runs > F else [t[:F] for t in sums]
    if runs > F or n_parts:
        _add_parts[(F,)](first, ends, *sums, *grads, F=F, CHUNKS=runs // F, C=C, BLOCK=WIDE,
                         num_warps=4)
    dW_enc, dW_dec, db_enc = grads
    dh = _gather(dvalues, indices, W_enc.to(h.dtype).contiguous(), None, h.dtype)
    return dh, dW_enc.to(W_enc.dtype), db_enc, dW_dec.to(W_dec.dtype)

@_autoencode_backward.register_fake
def _(gy, gvalues, h, W_enc, W_dec, values, indices, order, starts):
    dh, dW_enc, dW_dec = (t.new_empty(t.shape) for t in (h, W_enc, W_dec))
    return dh, dW_enc, values.new_empty(len(W_enc)), dW_dec

def _setup(ctx, inputs, output):
    h, W_enc, _, W_dec, _, _ = inputs
    _, values, indices, _, order, starts = output
    ctx.set_materialize_grads(False)   # mostly only y is used: then the values' gradient is None
    ctx.save_for_backward(h, W_enc, W_dec, values, indices, order, starts)

def _backward(ctx, gy, gvalues, *_):
    gy = torch.zeros_like(ctx.saved_tensors[0]) if gy is None else gy
    grads = _autoencode_backward(gy, gvalues, *ctx.saved_tensors)
    return *grads, gy.sum(0, dtype=torch.float32), None

_autoencode.register_autograd(_backward, setup_context=_setup)

def topk_autoencode(h, W_enc, b_enc, W_dec, b_dec, k):
    """
    The SAE layer of sae.py, but for the mean: h (N, C) -> y (N, C) in h's dtype; values (N, k)
    fp32 and indices (N, k) int32, from the largest value down, ties by lowest index; fired (F,)
    int32, on how many tokens each feature is active. Differentiable in y and values, for all five
    tensors. A slot beyond a token's positive activations has value 0 and index 0, and gets no
    gradient. NaN in a row of h gives NaN in that row of y.
    Under autocast pass h in its dtype; the parameters may stay fp32. ValueError where not `fits`.
    """
    if not fits(len(h), *W_enc.shape, k, h.dtype, h.device):
        raise ValueError(f"no kernel takes {tuple(h.shape)} {h.dtype} on {h.device} with k={k} of "
                         f"{len(W_enc)} features: use the plain path of sae.py")
    return _autoencode(h, W_enc, b_enc, W_dec, b_dec, k)[:4]

# ---------------------------------------------------------------------------- MLP
@torch.library.custom_op("sae::mlp", mutates_args=())
def _mlp(x: Tensor, W_fc: Tensor, W_proj: Tensor) -> tuple[Tensor, Tensor]:
    """-> the result and act, the hidden layer."""
    x = x.contiguous()
    act = x.new_empty(len(x), len(W_fc))
    _fused_matmul("relu2", x, W_fc.to(x.dtype).contiguous(), act, MLP_TILE)
    return act @ W_proj.to(x.dtype).t(), act

@_mlp.register_fake
def _(x, W_fc, W_proj):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], W_fc.shape[0])

@torch.library.custom_op("sae::mlp_backward", mutates_args=())
def _mlp_backward(g: Tensor, x: Tensor, act: Tensor, W_fc: Tensor, W_proj: Tensor,
                  ) -> tuple[Tensor, Tensor, Tensor]:
    g, x = g.to(x.dtype).contiguous(), x.contiguous()
    dpre = _fused_matmul("backward", g, W_proj.to(x.dtype).contiguous(), torch.empty_like(act),
                         MLP_TILE, act=act)
    dW_fc, dW_proj = (dpre.t() @ x).to(W_fc.dtype), (g.t() @ act).to(W_proj.dtype)
    return dpre @ W_fc.to(x.dtype), dW_fc, dW_proj

@_mlp_backward.register_fake
def _(g, x, act, W_fc, W_proj):
    return x.new_empty(x.shape), torch.empty_like(W_fc), torch.empty_like(W_proj)

def _setup_mlp(ctx, inputs, output):
    ctx.set_materialize_grads(False)   # act's: nothing uses it outside
    x, W_fc, W_proj = inputs
    ctx.save_for_backward(x, output[1], W_fc, W_proj)

_mlp.register_autograd(lambda ctx, g, _: _mlp_backward(g, *ctx.saved_tensors),
                       setup_context=_setup_mlp)

def mlp(x, W_fc, W_proj):
    """
    A GPT's MLP: relu(x W_fc^T)^2 W_proj^T, x (..., C), W_fc (4C, C), W_proj (C, 4C) -> (..., C).
    Differentiable, once, in all three. Under autocast pass x in its dtype; weights may stay fp32.
    Kernel: bf16 on Hopper, 1024 tokens or more, widths multiples of 8.
    """
    if not _fits_matmul(x, *W_fc.shape):
        return linear(torch.relu(linear(x, W_fc.to(x.dtype))).square(), W_proj.to(x.dtype))
    return _mlp(x.flatten(0, -2), W_fc, W_proj)[0].view_as(x)

# ---------------------------------------------------------------------------- head and loss
@jit
def _softmax_loss(logits, targets, losses, scale, V: tl.constexpr, V_PAD: tl.constexpr,
                  BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """
    One row of logits -> its loss and (GRAD), in place, scale (softmax - onehot), 0 in the padding.

    Bytes: each logit once from memory, once from the L2, and written once: 6.6 GB at N=32768,
    V=50304 in bf16. The maximum is the row's so far, a scalar: rescaling takes an exp a block.
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
def _linear_loss(x: Tensor, W: Tensor, targets: Tensor, vocab_size: int, grads: bool,
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss and, where grads are wanted, its gradients for x and W: they are 16 times smaller
    than the logits, which the forward pass has in hand (N=32768: 0.2 GB, not 3.3)."""
    x, targets, W_x = x.contiguous(), targets.contiguous(), W.to(x.dtype).contiguous()
    N, V_PAD = x.shape[0], W.shape[0]
    slices = _slices(N, V_PAD * x.element_size(), LOGITS_MB)
    buffer = torch.empty(slices[0].stop, V_PAD, dtype=x.dtype, device=x.device)
    losses = torch.empty(N, device=x.device)
    dx = torch.empty(x.shape if grads else 0, dtype=x.dtype, device=x.device)
    dW = torch.empty(W.shape if grads else 0, device=x.device)
    BLOCK = min(LOSS_BLOCK, triton.next_power_of_2(V_PAD))
    for s in slices:
        logits = torch.mm(x[s], W_x.t(), out=buffer[:s.stop - s.start])     # (rows, V_PAD)
        _softmax_loss[(len(logits),)](
            logits, targets[s], losses[s], 1 / N, V=vocab_size, V_PAD=V_PAD, BLOCK=BLOCK,
            GRAD=grads, num_warps=max(1, min(4, BLOCK // 32)))
        if grads:   # the buffer holds d loss / d logits now
            torch.mm(logits, W_x, out=dx[s])
            a, b, beta = logits.t(), x[s], int(s.start > 0)   # 0: dW is not read
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
    Under autocast pass x in its dtype; W may stay fp32.
    Kernels: N > 0, x in fp32 or bf16 (fp16 would lose gradients of 1/N).
    """
    if not (available(x.device) and x.dtype in (torch.float32, torch.bfloat16) and x.shape[0] > 0):
        logits = linear(x, W.to(x.dtype))[:, :vocab_size]                   # (N, V)
        return cross_entropy(logits.float(), targets)
    grads = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    return _linear_loss(x, W, targets, vocab_size, grads)[0]
