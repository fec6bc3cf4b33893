#!/usr/bin/env python3
"""Golden vectors for a QDyLoRA library.  Deterministic (every tensor is drawn from its own seeded
torch.Generator).  Run:  OMP_NUM_THREADS=1 python3 make_golden.py [outdir]
(pip install torch bitsandbytes==0.50.2 peft==0.21.2 transformers==5.23.0 safetensors gguf)
Oracles: torch, bitsandbytes (CPU backend), peft, transformers, safetensors, gguf; plus small independent
re-implementations ("ref_*") written from the formulas, used where the bnb CPU backend deviates."""
import os, sys, json, math, struct, hashlib, shutil, platform, warnings
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")
import numpy as np, torch
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
import bitsandbytes as bnb, bitsandbytes.functional as F
import safetensors, safetensors.torch as st
import peft, transformers, gguf

OUT = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
MAN = {"files": {}, "versions": {
    "python": platform.python_version(), "torch": torch.__version__, "bitsandbytes": bnb.__version__,
    "peft": peft.__version__, "transformers": transformers.__version__, "safetensors": safetensors.__version__,
    "numpy": np.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}}
f32 = np.float32
SEED_OFFSET = int(os.environ.get("GOLDEN_SEED_OFFSET", "0"))  # another offset gives an independent set of the same cases
def G(seed): return torch.Generator().manual_seed(seed + SEED_OFFSET)
def randn(seed, *s): return torch.randn(*s, generator=G(seed))
def save(name, tensors, desc, meta=None):
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    p = os.path.join(OUT, name); os.makedirs(os.path.dirname(p), exist_ok=True)
    st.save_file(tensors, p, metadata={k: (v if isinstance(v, str) else json.dumps(v)) for k, v in (meta or {}).items()})
    note(name, desc)
def note(name, desc):
    p = os.path.join(OUT, name); b = open(p, "rb").read()
    MAN["files"][name] = {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest(), "desc": desc}
def dump(name, obj, desc):
    with open(os.path.join(OUT, name), "w") as fh: json.dump(obj, fh, indent=1, sort_keys=True)
    note(name, desc)

# ----------------------------------------------------------------------------- code books
NF4 = F.get_4bit_type("nf4", device="cpu"); FP4 = F.get_4bit_type("fp4", device="cpu")
NF4_THR = (NF4[:-1] + NF4[1:]) / 2
FP4_ORDER = torch.argsort(FP4); FP4_THR = (FP4[FP4_ORDER[:-1]] + FP4[FP4_ORDER[1:]]) / 2
DYN_S = F.create_dynamic_map(True); DYN_U = F.create_dynamic_map(False)
FP4_THR_CUDA = torch.tensor([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], dtype=torch.float32)

def codes():
    t = {"nf4": NF4, "nf4_thresholds": NF4_THR, "fp4": FP4, "fp4_sorted_order": FP4_ORDER.to(torch.int32),
         "fp4_thresholds_cpu": FP4_THR, "fp4_abs_thresholds_cuda": FP4_THR_CUDA, "af4": F.get_4bit_type("af4", device="cpu"),
         "dynamic_signed": DYN_S, "dynamic_unsigned": DYN_U,
         "linear_signed": F.create_linear_map(True), "linear_unsigned": F.create_linear_map(False),
         "bnb_fp8_e4m3_map": F.create_fp8_map(True, 4, 3, 8), "bnb_fp8_e5m2_map": F.create_fp8_map(True, 5, 2, 8),
         "bnb_fp4_e2m1_map_unique": F.create_fp8_map(True, 2, 1, 4).unique(),
         "bnb_fp4_e3m0_map_unique": F.create_fp8_map(True, 3, 0, 4).unique()}
    u = torch.arange(256, dtype=torch.uint8)
    t["ocp_e4m3fn_by_code"] = u.view(torch.float8_e4m3fn).float()
    t["ocp_e5m2_by_code"] = u.view(torch.float8_e5m2).float()
    # float32 -> fp8 (torch RNE; e4m3fn: torch saturates? overflow -> NaN; e5m2 overflow -> inf) samples
    x = torch.cat([randn(11, 200) * 50, torch.tensor([0., -0., 448., 449., 464., 465., 480., 1e9, -1e9, 2**-9, 2**-10, 2**-10 * 1.01,
                   57344., 61439., 61440., 65536., 2**-16, 2**-17, 2**-17 * 1.01, float("inf"), -float("inf"), float("nan")])])
    t["fp8cvt_in"] = x; t["fp8cvt_e4m3fn"] = x.to(torch.float8_e4m3fn).view(torch.uint8); t["fp8cvt_e5m2"] = x.to(torch.float8_e5m2).view(torch.uint8)
    t["bf16cvt_u16"] = x.to(torch.bfloat16).view(torch.int16); t["fp16cvt_u16"] = x.to(torch.float16).view(torch.int16)
    save("codes.safetensors", t, "code books / thresholds (float32) + OCP fp8 decode tables by code + f32->fp8/bf16/fp16 cast samples (int16 = raw bits)")

# ----------------------------------------------------------------------------- reference (CUDA-semantics) quantisers, IEEE arithmetic
def ref_nf4_code(v):   # strict '>' against thresholds, NaN -> 0
    c = np.zeros(v.shape, np.uint8)
    with np.errstate(invalid="ignore"):
        for th in NF4_THR.numpy(): c += (v > th)
    return c
FP4_MAG = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)   # magnitude rank -> 3-bit pattern
def ref_fp4_code(v):
    with np.errstate(invalid="ignore"):
        sign = np.where(v < 0, 8, 0).astype(np.uint8); a = np.abs(v); r = np.zeros(v.shape, np.int64)
        for th in FP4_THR_CUDA.numpy(): r += (a > th)
    return FP4_MAG[r] + sign
def ref_q4(x, bs, typ):
    x = x.detach().float().reshape(-1).numpy(); n = x.size; nb = -(-n // bs)
    codes_, am = np.zeros(n + (n & 1), np.uint8), np.zeros(nb, np.float32)
    fn = ref_nf4_code if typ == "nf4" else ref_fp4_code
    for b in range(nb):
        blk = x[b * bs:(b + 1) * bs]
        m = f32(np.fmax.reduce(np.abs(blk), initial=-np.finfo(np.float32).max)); am[b] = m
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            inv = f32(1.0) / m; codes_[b * bs:b * bs + blk.size] = fn((blk * inv).astype(np.float32))
            if b == nb - 1 and (n & 1): codes_[n] = fn(np.array([f32(0) * inv], np.float32))[0]
    return torch.from_numpy((codes_[0::2] << 4) | codes_[1::2]).reshape(-1, 1), torch.from_numpy(am)
def ref_dq4(packed, am, bs, typ, shape):
    p = packed.reshape(-1).numpy(); c = np.empty(p.size * 2, np.uint8); c[0::2] = p >> 4; c[1::2] = p & 15
    n = int(np.prod(shape)); cb = (NF4 if typ == "nf4" else FP4).numpy()
    with np.errstate(all="ignore"):
        v = cb[c[:n]] * np.repeat(am.numpy(), bs)[:n]
    return torch.from_numpy(v.astype(np.float32)).reshape(shape)
def ref_dquantize(code, x):        # bnb CUDA dQuantize<0>: 7-step binary search then midpoint test
    piv, up, lo = 127, 255, 0; val = code[piv]; i = 64; lower, upper = f32(-1), f32(1)
    while i > 0:
        if x > val: lo, lower = piv, val; piv += i
        else: up, upper = piv, val; piv -= i
        val = code[piv]; i >>= 1
    if up == 255: upper = code[up]
    if lo == 0: lower = code[lo]
    if x > val: return up if x > f32((upper + val) * f32(0.5)) else piv
    return lo if x < f32((lower + val) * f32(0.5)) else piv
def ref_quantize2d(code, x, signed):   # 8-bit optimizer search: same search, lower starts at -1/0 and is NOT fixed up at the ends
    piv, up, lo = 127, 255, 0; val = code[piv]; i = 64; lower, upper = f32(-1 if signed else 0), f32(1)
    while i > 0:
        if x > val: lo, lower = piv, val; piv += i
        else: up, upper = piv, val; piv -= i
        val = code[piv]; i >>= 1
    if x > val: return up if x > f32((upper + val) * f32(0.5)) else piv
    return lo if x < f32((lower + val) * f32(0.5)) else piv
def ref_q8(x, bs, code):
    x = x.detach().float().reshape(-1).numpy(); code = code.numpy(); n = x.size; nb = -(-n // bs); out = np.zeros(n, np.uint8); am = np.zeros(nb, np.float32)
    for b in range(nb):
        blk = x[b * bs:(b + 1) * bs]; m = f32(np.fmax.reduce(np.abs(blk))); am[b] = m
        with np.errstate(all="ignore"):
            inv = f32(1) / m; s = (blk * inv).astype(np.float32)
            out[b * bs:b * bs + blk.size] = [ref_dquantize(code, v) for v in s]
    return torch.from_numpy(out), torch.from_numpy(am)
def ref_dq8(q, am, bs, code):
    with np.errstate(all="ignore"):
        return torch.from_numpy((code.numpy()[q.numpy()] * np.repeat(am.numpy(), bs)[:q.numel()]).astype(np.float32))

# ----------------------------------------------------------------------------- 4-bit quantise / dequantise
def ties(thr, bs):
    x = torch.zeros(bs); k = thr.numel(); x[:k] = thr; x[k] = 1.0
    x[k + 1:2 * k + 1] = torch.nextafter(thr, torch.tensor(2.0)); x[2 * k + 1:3 * k + 1] = torch.nextafter(thr, torch.tensor(-2.0)); return x
def q4():
    t, meta = {}, {}
    def case(name, x, bs, typ, full=False, shape=None, note=""):
        shape = list(x.shape) if shape is None else shape
        flat = x.reshape(-1)                                   # 1-D on purpose: the AVX512 CPU dequant is wrong for rows % blocksize != 0
        q, s = F.quantize_4bit(flat, blocksize=bs, quant_type=typ)
        d = ref_dq4(q, s.absmax, bs, typ, shape)
        if bs < 2048 or True:
            dd = F.dequantize_4bit(q, s).reshape(shape)
            same = torch.equal(torch.nan_to_num(dd, 7.), torch.nan_to_num(d, 7.))
            if not same: note += " | ref dequant differs from bnb CPU 1-D dequant (max %g)" % float((dd - d).abs().nan_to_num(0).max())
        rq, ram = ref_q4(x, bs, typ)
        t[name + "/x"] = x; t[name + "/packed"] = q; t[name + "/absmax"] = s.absmax; t[name + "/dequant_f32"] = d
        if not torch.equal(rq, q): t[name + "/packed_ref_cuda"] = rq
        if not torch.equal(ram.nan_to_num(7.), s.absmax.nan_to_num(7.)): t[name + "/absmax_ref_cuda"] = ram
        if full:
            t[name + "/dequant_bf16"] = d.to(torch.bfloat16); t[name + "/dequant_fp16"] = d.to(torch.float16)
            for dt, nm in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
                s.dtype = dt; assert torch.equal(F.dequantize_4bit(q, s).reshape(shape), d.to(dt)), nm
        meta[name] = {"blocksize": bs, "type": typ, "shape": shape, "n": int(x.numel()), "note": note.strip()}
    N = randn(100, 1024)
    for typ in ("nf4", "fp4"):
        for bs in (32, 64, 128, 256, 512, 1024): case(f"normal1024_{typ}_b{bs}", N, bs, typ, full=bs == 64)
        case(f"normal8192_{typ}_b4096", randn(101, 8192), 4096, typ); case(f"normal5000_{typ}_b2048", randn(102, 5000), 2048, typ)
        case(f"uniform512_{typ}_b64", torch.rand(512, generator=G(103)) * 2 - 1, 64, typ)
        case(f"small512_{typ}_b64", randn(104, 512) * 0.02, 64, typ)
        h = randn(105, 256) * 0.02; h[10] = 7.5; h[100] = -3.0; case(f"outlier256_{typ}_b64", h, 64, typ)
        z = randn(106, 256); z[64:128] = 0; case(f"zeroblock256_{typ}_b64", z, 64, typ, note="block 1 all zero: CPU codes 7/0, CUDA 0 (0*inf=NaN)")
        case(f"allzero70_{typ}_b64", torch.zeros(70), 64, typ, note="partial zero block: CPU stores absmax 1e-38, CUDA 0")
        case(f"negzero64_{typ}_b64", torch.cat([-torch.zeros(63), torch.ones(1)]), 64, typ)
        for n in (1, 2, 3, 63, 65, 127, 129, 1001): case(f"odd{n}_{typ}_b64", randn(200 + n, n), 64, typ)
        case(f"denormal128_{typ}_b64", randn(107, 128) * 1e-40, 64, typ, note="all inputs subnormal; CPU clamps the divisor to 1e-38")
        case(f"tiny128_{typ}_b64", randn(108, 128) * 1e-37, 64, typ)
        case(f"huge128_{typ}_b64", (randn(109, 128) * 1e38).clamp(-3.4e38, 3.4e38), 64, typ)
        case(f"const64_{typ}_b64", torch.full((64,), -0.3), 64, typ); case(f"rows6x80_{typ}_b64", randn(110, 6, 80), 64, typ, note="blocks cross row boundaries (flattened row major)")
        case(f"rows5x7_{typ}_b64", randn(111, 5, 7), 64, typ); case(f"w96x128_{typ}_b64", randn(112, 96, 128) * 0.05, 64, typ)
        b = randn(113, 256).to(torch.bfloat16); case(f"bf16in256_{typ}_b64", b, 64, typ); case(f"fp16in256_{typ}_b64", randn(114, 256).to(torch.float16), 64, typ)
    case("ties_nf4_b64", ties(NF4_THR, 64), 64, "nf4", note="x[0:15]=thresholds, x[15]=1, then nextafter up (15), down (15)")
    case("ties_fp4_b64", ties(FP4_THR, 64), 64, "fp4", note="thresholds = CPU fp32 midpoints")
    tc = torch.zeros(64); tc[:7] = FP4_THR_CUDA; tc[7:14] = -FP4_THR_CUDA; tc[14] = 1; tc[15] = 1e-3; tc[16] = -1e-3
    case("ties_fp4cuda_b64", tc, 64, "fp4", note="x[0:7]=+cuda thresholds, x[7:14]=-cuda thresholds")
    nn = randn(115, 64); nn[5] = float("nan"); case("nan64_nf4_b64", nn, 64, "nf4", note="CPU: absmax NaN, all codes 15; CUDA: NaN ignored by fmaxf, its code 0")
    nn = randn(116, 64); nn[5] = float("inf"); case("inf64_nf4_b64", nn, 64, "nf4")
    # the bnb 0.50.2 AVX512 dequant defect, kept as evidence only
    W = randn(110, 6, 80); q, s = F.quantize_4bit(W, blocksize=64, quant_type="nf4"); bad = F.dequantize_4bit(q, s)
    t["DEFECT_rows6x80_nf4_b64/dequant_bnb_cpu_avx512"] = bad
    meta["DEFECT_rows6x80_nf4_b64"] = {"note": "bnb CPU AVX512 output for a 2-D shape whose last dim is not a multiple of blocksize; WRONG, do not match", "maxdiff": float((bad - ref_dq4(q, s.absmax, 64, 'nf4', [6, 80])).abs().max())}
    save("quant4.safetensors", t, "4-bit quantise/dequantise cases: <case>/{x,packed,absmax,dequant_f32[,dequant_bf16,dequant_fp16][,packed_ref_cuda,absmax_ref_cuda]}; per-case parameters in quant4.json. packed/absmax come from bnb CPU; *_ref_cuda only present where CUDA semantics differ")
    dump("quant4.json", meta, "parameters and notes of the cases in quant4.safetensors")

# ----------------------------------------------------------------------------- 8-bit blockwise + nested
def q8():
    t, meta = {}, {}
    def case(name, x, bs, code=None, cname="dynamic_signed"):
        code = DYN_S if code is None else code
        q, s = F.quantize_blockwise(x, code=code.clone(), blocksize=bs); rq, ram = ref_q8(x, bs, code)
        t[name + "/x"] = x; t[name + "/absmax"] = ram; t[name + "/q"] = rq; t[name + "/dequant_f32"] = ref_dq8(rq, ram, bs, code)
        if not torch.equal(q, rq): t[name + "/q_bnb_cpu"] = q; t[name + "/dequant_f32_bnb_cpu"] = ref_dq8(q, s.absmax, bs, code)
        assert torch.equal(s.absmax, ram)
        meta[name] = {"blocksize": bs, "code": cname, "n": int(x.numel()), "n_differ_cpu": int((q != rq).sum()), "n_differ_cpu_by_more_than_1": int(((q.int() - rq.int()).abs() > 1).sum())}
    case("normal1024_b256", randn(300, 1024), 256); case("normal1000_b256", randn(301, 1000), 256); case("normal512_b64", randn(302, 512), 64)
    case("positive700_unsigned_b256", randn(303, 700).abs() ** 3, 256, DYN_U, "dynamic_unsigned"); z = torch.zeros(300); z[256:] = randn(304, 44); case("zeroblock300_b256", z, 256)
    x = torch.zeros(256); x[0] = 1; x[1:8] = torch.tensor([1e-6, -1e-6, 1e-5, -1e-5, 3e-5, -3e-5, 1e-7]); case("tiny256_b256", x, 256)
    m = (DYN_S[:-1] + DYN_S[1:]) / 2; case("ties255_b256", torch.cat([m, torch.ones(1)]), 256); case("codes256_b256", DYN_S.clone(), 256)
    save("quant8.safetensors", t, "8-bit blockwise cases: q/absmax/dequant_f32 follow the CUDA search (exact nearest); *_bnb_cpu present where bnb's CPU 65536-bin LUT gives other codes")
    dump("quant8.json", meta, "parameters of quant8 cases")
def nested():
    t, meta = {}, {}
    for name, n, sc, bs, typ in (("n64", 64, .02, 64, "nf4"), ("n4096", 4096, .02, 64, "nf4"), ("n19200", 19200, .02, 64, "nf4"), ("n20000_b128", 20000, 1., 128, "nf4"), ("n8192_fp4", 8192, .05, 64, "fp4"), ("n16448", 16448, .3, 64, "nf4")):
        g = G(400 + n); x = torch.randn(n, generator=g) * sc * torch.exp(0.3 * torch.randn(n, generator=g))
        q, s1 = F.quantize_4bit(x, blocksize=bs, quant_type=typ); q2, s = F.quantize_4bit(x, blocksize=bs, quant_type=typ, compress_statistics=True)
        assert torch.equal(q, q2); off = s1.absmax.mean(); assert torch.equal(off, s.offset)
        rq, ram = ref_q8(s1.absmax - off, 256, DYN_S); assert torch.equal(ram, s.state2.absmax)
        adq_cpu = F.dequantize_blockwise(s.absmax, s.state2) + s.offset; adq = ref_dq8(rq, ram, 256, DYN_S) + off
        p = name + "/"
        if n <= 8192: t[p + "x"] = x
        t[p + "packed"] = q; t[p + "absmax_f32"] = s1.absmax; t[p + "offset"] = off.reshape(1); t[p + "nested_absmax"] = ram
        t[p + "qabsmax_bnb_cpu"] = s.absmax; t[p + "qabsmax_ref_cuda"] = rq; t[p + "absmax_dequant_bnb_cpu"] = adq_cpu; t[p + "absmax_dequant_ref_cuda"] = adq
        if n <= 8192: t[p + "dequant_f32_bnb_cpu"] = ref_dq4(q, adq_cpu, bs, typ, [n]); assert torch.equal(t[p + "dequant_f32_bnb_cpu"], F.dequantize_4bit(q2, s).reshape(-1))
        bits = 4 + 8 / bs + 32 / (bs * 256); real = (q.numel() + s.absmax.numel() + 4 * ram.numel() + 4) * 8 / n
        meta[name] = {"n": n, "blocksize": bs, "type": typ, "nested_blocksize": 256, "n_absmax": int(s1.absmax.numel()), "n_differ_cpu": int((rq != s.absmax).sum()), "bits_per_param_formula": bits, "bits_per_param_actual_with_offset": real}
    save("nested.safetensors", t, "double quantisation: packed codes, first-level absmax (fp32), offset=mean, u8 codes of absmax-offset (bnb CPU LUT and exact/CUDA variants), nested absmax, dequantised absmax and weights")
    dump("nested.json", meta, "parameters of nested cases")

# ----------------------------------------------------------------------------- Linear4bit state dicts
def linear4bit():
    io = {}
    for typ in ("nf4", "fp4"):
        for cs in (False, True):
            W, bvec = randn(500, 96, 128) * 0.05, randn(501, 96) * 0.1
            lin = bnb.nn.Linear4bit(128, 96, bias=True, compute_dtype=torch.float32, compress_statistics=cs, quant_type=typ)
            lin.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, compress_statistics=cs, quant_type=typ, module=lin); lin.bias.data.copy_(bvec)
            lin = lin.to("cpu").train(); name = f"linear4bit_{typ}_{'dq' if cs else 'nodq'}.safetensors"
            st.save_file(lin.state_dict(), os.path.join(OUT, name)); note(name, f"bnb Linear4bit(128,96,bias) state_dict saved by safetensors; quant_type={typ} compress_statistics={cs}")
            k = f"{typ}_{'dq' if cs else 'nodq'}/"; X = randn(502, 2, 5, 128).requires_grad_(True); Y = lin(X); dY = randn(503, 2, 5, 96); Y.backward(dY)
            Wd = F.dequantize_4bit(lin.weight.data, lin.weight.quant_state); io[k + "W_dequant"] = Wd; io[k + "Y"] = Y; io[k + "dX"] = X.grad
    io["W"], io["bias"], io["X"], io["dY"] = W, bvec, X.detach(), dY
    W = randn(500, 96, 128) * 0.05; lin = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
    lin.weight = bnb.nn.Params4bit(W.to(torch.bfloat16), requires_grad=False, compress_statistics=True, quant_type="nf4", module=lin); lin = lin.to("cpu").train()
    st.save_file(lin.state_dict(), os.path.join(OUT, "linear4bit_nf4_dq_bf16.safetensors")); note("linear4bit_nf4_dq_bf16.safetensors", "same weight given as bfloat16 (quant_state dtype=bfloat16), no bias")
    Xb = io["X"].to(torch.bfloat16); io["bf16/Y"] = lin(Xb.requires_grad_(True)); io["bf16/W_dequant"] = F.dequantize_4bit(lin.weight.data, lin.weight.quant_state)
    save("linear4bit_io.safetensors", io, "inputs X [2,5,128], dY, outputs Y, dX, dequantised weights for the linear4bit_*.safetensors state dicts")

# ----------------------------------------------------------------------------- LoRA / rsLoRA / DyLoRA on one linear layer, analytic + autograd checked
def lora_fwd_bwd(X, W, bias, A, B, s, dY, mask=None):
    Xl = X if mask is None else X * mask
    H = Xl @ A.T; Y = X @ W.T + (0 if bias is None else bias) + s * (H @ B.T)
    f = lambda z: z.reshape(-1, z.shape[-1]); dYB = dY @ B
    dB = s * f(dY).T @ f(H); dA = s * f(dYB).T @ f(Xl); dXl = s * (dYB @ A); dX = dY @ W + (dXl if mask is None else dXl * mask)
    return Y, dX, dA, dB
def lora():
    t, meta = {}, {}
    out, inn, r, al = 24, 40, 8, 16
    X, W, bias, A, B, dY = randn(600, 3, 7, inn), randn(601, out, inn) * .1, randn(602, out) * .1, (torch.rand(r, inn, generator=G(603)) * 2 - 1) / math.sqrt(inn), randn(604, out, r) * .05, randn(605, 3, 7, out)
    t.update({"X": X, "W": W, "bias": bias, "A": A, "B": B, "dY": dY})
    def chk(name, s, b=None, frozen=False, mask=None):
        b_ = r if b is None else b
        Ap, Bp, Xp = A.clone().requires_grad_(True), B.clone().requires_grad_(True), X.clone().requires_grad_(True)
        a, bb = Ap[:b_], Bp[:, :b_]
        if frozen: a = torch.cat([Ap[:b_ - 1].detach(), Ap[b_ - 1:b_]]); bb = torch.cat([Bp[:, :b_ - 1].detach(), Bp[:, b_ - 1:b_]], 1)
        Xl = Xp if mask is None else Xp * mask
        Y = Xp @ W.T + bias + s * ((Xl @ a.T) @ bb.T); Y.backward(dY)
        Yr, dXr, dAr, dBr = lora_fwd_bwd(X, W, bias, A[:b_], B[:, :b_], s, dY, mask)
        assert torch.allclose(Y, Yr, atol=1e-5) and torch.allclose(Xp.grad, dXr, atol=1e-5)
        lo = b_ - 1 if frozen else 0
        assert torch.allclose(Ap.grad[lo:b_], dAr[lo:], atol=1e-5) and torch.allclose(Bp.grad[:, lo:b_], dBr[:, lo:], atol=1e-5) and Ap.grad[b_:].abs().sum() == 0 and Ap.grad[:lo].abs().sum() == 0
        for k, v in (("Y", Y), ("dX", Xp.grad), ("dA", Ap.grad), ("dB", Bp.grad)): t[f"{name}/{k}"] = v
        meta[name] = {"scale": s, "b": b_, "frozen": frozen, "r": r, "alpha": al}
    chk("lora", al / r); chk("rslora", al / math.sqrt(r))
    mask = (torch.rand(3, 7, inn, generator=G(606)) >= 0.1).float() / 0.9; t["dropout_mask_p0.1"] = mask; chk("lora_dropout", al / r, mask=mask)
    for b in (1, 2, 4, 8):
        for fz in (False, True): chk(f"dylora_b{b}_{'frozen' if fz else 'all'}", al / b, b, fz)
    t["merged_W_r8"] = W + (al / r) * (B @ A)
    for b in (1, 2, 4): t[f"merged_W_b{b}"] = W + (al / b) * (B[:, :b] @ A[:b])
    save("lora.safetensors", t, "single linear layer [out=24,in=40], r=8, alpha=16, X [3,7,40]: forward and gradients for LoRA, rsLoRA, dropout mask (inverted, p=0.1), DyLoRA rank b in {1,2,4,8} with scale alpha/b, all/frozen; merged weights")
    dump("lora.json", meta, "scales of the lora.safetensors cases")
def dylora_train():
    """Regression toy: loss = mean((Y-T)^2). Rank schedule recorded. Three optimisers x {all, frozen}.
    'frozen' variant A ("masked"): rows outside {b} untouched by the optimiser (paper's Eq.10). variant B ("autograd"): gradient zero but the
    optimiser still sees it (official code + AdamW: momentum/weight decay move the other rows)."""
    t, meta = {}, {}
    out, inn, r, al, n = 16, 20, 8, 16, 32
    W, X, T = randn(700, out, inn) * .2, randn(701, n, inn), randn(702, n, out)
    A0, B0 = (torch.rand(r, inn, generator=G(703)) * 2 - 1) / math.sqrt(inn), torch.zeros(out, r)
    ranks = [5, 1, 8, 3, 3, 8, 2, 6]
    t.update({"W": W, "X": X, "T": T, "A0": A0, "B0": B0}); meta["ranks"] = ranks; meta["alpha"] = al
    def run(tag, mode, opt_name, lr, wd):
        A, B = A0.clone().requires_grad_(True), B0.clone().requires_grad_(True)
        opt = torch.optim.SGD([A, B], lr=lr) if opt_name == "sgd" else torch.optim.AdamW([A, B], lr=lr, weight_decay=wd, foreach=False)
        losses = []
        for b in ranks:
            opt.zero_grad(set_to_none=True); a, bb = A[:b], B[:, :b]
            if mode != "all": a = torch.cat([A[:b - 1].detach(), A[b - 1:b]]); bb = torch.cat([B[:, :b - 1].detach(), B[:, b - 1:b]], 1)
            loss = ((X @ W.T + (al / b) * ((X @ a.T) @ bb.T) - T) ** 2).mean(); losses.append(loss.item()); loss.backward()
            opt.step()
        t[f"{tag}/A"], t[f"{tag}/B"], t[f"{tag}/loss"] = A, B, torch.tensor(losses); meta[tag] = {"optimizer": opt_name, "lr": lr, "weight_decay": wd, "mode": mode}
    run("sgd_all", "all", "sgd", .05, 0); run("sgd_frozen", "frozen", "sgd", .05, 0)
    run("adamw_all_wd0", "all", "adamw", 1e-2, 0); run("adamw_all_wd0.1", "all", "adamw", 1e-2, .1)
    run("adamw_frozen_autograd_wd0", "frozen", "adamw", 1e-2, 0); run("adamw_frozen_autograd_wd0.1", "frozen", "adamw", 1e-2, .1)
    # truly frozen AdamW: per-row/col state and step counters, only row/col b-1 is touched
    A, B = A0.clone(), B0.clone(); mA, vA, mB, vB, st_ = torch.zeros_like(A), torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(B), [0] * r; losses = []
    lr, b1, b2, eps, wd = 1e-2, .9, .999, 1e-8, .1
    for b in ranks:
        s = al / b; H = X @ A[:b].T; E = X @ W.T + s * H @ B[:, :b].T - T; losses.append((E ** 2).mean().item()); dY = 2 * E / E.numel(); i = b - 1; st_[i] += 1; k = st_[i]
        gA, gB = s * (dY @ B[:, i]) @ X, s * dY.T @ H[:, i]
        for P, g, m, v, sl in ((A, gA, mA, vA, (i,)), (B, gB, mB, vB, (slice(None), i))):
            P[sl] *= 1 - lr * wd; m[sl] = b1 * m[sl] + (1 - b1) * g; v[sl] = b2 * v[sl] + (1 - b2) * g * g
            P[sl] -= lr / (1 - b1 ** k) * m[sl] / (v[sl].sqrt() / math.sqrt(1 - b2 ** k) + eps)
    t["adamw_frozen_strict_wd0.1/A"], t["adamw_frozen_strict_wd0.1/B"], t["adamw_frozen_strict_wd0.1/loss"] = A, B, torch.tensor(losses)
    meta["adamw_frozen_strict_wd0.1"] = {"optimizer": "adamw", "lr": lr, "weight_decay": wd, "mode": "frozen-strict (per-rank step counter; only row/col b touched)"}
    save("dylora_train.safetensors", t, "8-step DyLoRA training on a regression toy [out16,in20,r8,alpha16,n32] with a recorded rank schedule (dylora_train.json); final A,B and per-step losses for several optimiser/mode variants")
    dump("dylora_train.json", meta, "rank schedule and hyper-parameters")

# ----------------------------------------------------------------------------- optimisers
def adamw():
    t, meta = {}, {}
    n, T = 300, 10; p0 = randn(800, n); gr = torch.stack([randn(801 + i, n) * (0.1 + 0.3 * i) for i in range(T)]); gr[:, 7] = 0; t["p0"], t["grads"] = p0, gr
    for tag, lr, b, eps, wd in (("default", 1e-3, (.9, .999), 1e-8, 1e-2), ("qlora", 2e-4, (.9, .999), 1e-8, 0.), ("wd0.1", 1e-2, (.9, .95), 1e-6, .1)):
        p = torch.nn.Parameter(p0.clone()); o = torch.optim.AdamW([p], lr=lr, betas=b, eps=eps, weight_decay=wd, foreach=False); traj = []
        for g in gr: p.grad = g.clone(); o.step(); traj.append(p.detach().clone())
        t[f"torch_{tag}/p"] = torch.stack([traj[0], traj[1], traj[-1]]); s = o.state[p]; t[f"torch_{tag}/exp_avg"], t[f"torch_{tag}/exp_avg_sq"] = s["exp_avg"], s["exp_avg_sq"]
        p = torch.nn.Parameter(p0.clone()); o = bnb.optim.AdamW32bit([p], lr=lr, betas=b, eps=eps, weight_decay=wd)
        traj = []
        for g in gr: p.grad = g.clone(); o.step(); traj.append(p.detach().clone())
        t[f"bnb32cpu_{tag}/p"] = torch.stack([traj[0], traj[1], traj[-1]])
        # CUDA order: update first, then p *= 1-lr*wd
        q = p0.clone(); m, v = torch.zeros(n), torch.zeros(n); traj = []
        for k, g in enumerate(gr, 1):
            m = m * b[0] + (1 - b[0]) * g; v = v * b[1] + (1 - b[1]) * g * g; c1, c2 = 1 - b[0] ** k, math.sqrt(1 - b[1] ** k)
            q = q + (-lr * c2 / c1) * (m / (v.sqrt() + eps * c2))
            if wd > 0: q = q * (1 - lr * wd)
            traj.append(q.clone())
        t[f"cuda_order_{tag}/p"] = torch.stack([traj[0], traj[1], traj[-1]])
        meta[tag] = {"lr": lr, "betas": b, "eps": eps, "weight_decay": wd, "steps": T, "saved_p_steps": [1, 2, T]}
    p = torch.nn.Parameter(torch.zeros(3)); ps = [torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.zeros(7))]
    for i, q in enumerate(ps): q.grad = randn(850 + i, q.numel())
    t["clip/g0"], t["clip/g1"] = ps[0].grad.clone(), ps[1].grad.clone(); nrm = torch.nn.utils.clip_grad_norm_(ps, 0.3); t["clip/total_norm"] = nrm.reshape(1); t["clip/g0_clipped"], t["clip/g1_clipped"] = ps[0].grad, ps[1].grad
    meta["clip"] = {"max_norm": 0.3, "formula": "g *= min(1, max_norm/(norm+1e-6))"}
    save("adamw.safetensors", t, "AdamW fp32 trajectories: torch.optim.AdamW, bnb AdamW32bit on CPU (decay before update), and the CUDA-kernel order (decay after update); gradient clipping sample")
    dump("adamw.json", meta, "hyper-parameters of adamw.safetensors")
def adamw8():
    t, meta = {}, {}
    n, T, lr, b1, b2, eps, wd = 4100, 3, 1e-3, .9, .999, 1e-8, 1e-2
    p0 = randn(900, n); gr = torch.stack([randn(901 + i, n) * 0.05 for i in range(T)]); gr[:, 100:200] = 0; t["p0"], t["grads"] = p0, gr
    p = torch.nn.Parameter(p0.clone()); o = bnb.optim.AdamW8bit([p], lr=lr, betas=(b1, b2), eps=eps, weight_decay=wd)
    for k, g in enumerate(gr, 1):
        p.grad = g.clone(); o.step(); s = o.state[p]
        if k in (1, T):
            for key in ("state1", "state2", "absmax1", "absmax2"): t[f"bnbcpu/step{k}/{key}"] = s[key].clone()
            t[f"bnbcpu/step{k}/p"] = p.detach().clone()
    assert s["state1"].dtype == torch.uint8
    # CUDA kernel semantics in IEEE fp32 (no fast-math): blocksize 256, quantize_2D search, sign fix, decay after update
    cs, cu = DYN_S.numpy(), DYN_U.numpy(); P = p0.numpy().copy(); s1, s2 = np.zeros(n, np.uint8), np.zeros(n, np.uint8); nb = -(-n // 256); a1, a2 = np.zeros(nb, f32), np.zeros(nb, f32)
    for k, g in enumerate(gr.numpy(), 1):
        c1 = f32(1) - f32(b1) ** f32(k); c2 = np.sqrt(f32(1) - f32(b2) ** f32(k)); ss = f32(-lr) * c2 / c1
        for b in range(nb):
            sl = slice(b * 256, min(n, b * 256 + 256)); gg = g[sl]
            v = cu[s2[sl]] * a2[b]; v = v * f32(b2) + (f32(1) - f32(b2)) * gg * gg
            m = cs[s1[sl]] * a1[b]; m = m * f32(b1) + (f32(1) - f32(b1)) * gg
            M1, M2 = f32(np.abs(m).max()), f32(np.abs(v).max()); a1[b], a2[b] = M1, M2
            P[sl] = P[sl] + ss * (m / (np.sqrt(v) + c2 * f32(eps))); P[sl] = P[sl] * (f32(1) - f32(lr) * f32(wd))
            with np.errstate(all="ignore"):
                q1 = np.array([ref_quantize2d(cs, x, True) for x in (m / M1).astype(f32)], np.int64); q2 = np.array([ref_quantize2d(cu, x, False) for x in (v / M2).astype(f32)], np.int64)
            bad = np.signbit(cs[q1]) != np.signbit(m); q1 = np.where(bad, np.where(m > 0, q1 + 1, q1 - 1), q1)
            s1[sl], s2[sl] = q1.astype(np.uint8), q2.astype(np.uint8)
        if k in (1, T):
            for key, val in (("state1", s1), ("state2", s2), ("absmax1", a1), ("absmax2", a2), ("p", P)): t[f"ref_cuda/step{k}/{key}"] = torch.from_numpy(val.copy())
    meta.update({"n": n, "steps": T, "lr": lr, "betas": [b1, b2], "eps": eps, "weight_decay": wd, "blocksize": 256, "state1_code": "dynamic_signed", "state2_code": "dynamic_unsigned", "saved_steps": [1, T],
                 "max_abs_p_diff_bnbcpu_vs_refcuda": float((t[f"bnbcpu/step{T}/p"] - t[f"ref_cuda/step{T}/p"]).abs().max())})
    save("adamw8bit.safetensors", t, "8-bit blockwise AdamW, n=4100, 3 steps: bnb AdamW8bit on CPU (LUT quantiser, decay before update) and a re-derivation of the CUDA kernel in IEEE arithmetic (ref_cuda)")
    dump("adamw8bit.json", meta, "hyper-parameters of adamw8bit.safetensors")

# ----------------------------------------------------------------------------- peft adapters
def peft_linear():
    from peft import LoraConfig, get_peft_model
    class M(torch.nn.Module):
        def __init__(s):
            super().__init__(); lin = bnb.nn.Linear4bit(128, 96, bias=True, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
            lin.weight = bnb.nn.Params4bit(randn(500, 96, 128) * 0.05, requires_grad=False, compress_statistics=True, quant_type="nf4", module=lin); lin.bias.data.copy_(randn(501, 96) * .1); lin.bias.requires_grad_(False); s.lin = lin.to("cpu")
        def forward(s, x): return s.lin(x)
    m = M(); torch.manual_seed(7); pm = get_peft_model(m, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["lin"])); pm.train()
    L = pm.base_model.model.lin; L.lora_A["default"].weight.data.copy_((torch.rand(8, 128, generator=G(1000)) * 2 - 1) / math.sqrt(128)); L.lora_B["default"].weight.data.copy_(randn(1001, 96, 8) * .05)
    d = os.path.join(OUT, "peft_linear"); shutil.rmtree(d, ignore_errors=True); pm.save_pretrained(d); os.remove(os.path.join(d, "README.md"))
    X = randn(502, 2, 5, 128).requires_grad_(True); Y = pm(X); dY = randn(503, 2, 5, 96); Y.backward(dY)
    save("peft_linear/io.safetensors", {"X": X.detach(), "dY": dY, "Y": Y, "dX": X.grad, "dA": L.lora_A["default"].weight.grad, "dB": L.lora_B["default"].weight.grad, "scaling": torch.tensor([L.scaling["default"]])}, "peft LoRA r=8 alpha=16 on the Linear4bit of linear4bit_nf4_dq.safetensors: forward and gradients")
    for f in ("adapter_config.json", "adapter_model.safetensors"): note("peft_linear/" + f, "written by peft.save_pretrained")
def peft_llama():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, BitsAndBytesConfig
    cfg = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
    torch.manual_seed(1); base = LlamaForCausalLM(cfg)
    with torch.no_grad():
        for i, (k, p) in enumerate(sorted(base.named_parameters())): p.copy_(randn(1100 + i, *p.shape) * 0.08 + (1.0 if "norm" in k else 0.0))
    tmp = os.path.join(OUT, "_tmp"); base.save_pretrained(tmp)
    m = LlamaForCausalLM.from_pretrained(tmp, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32), device_map="cpu", attn_implementation="eager"); shutil.rmtree(tmp)
    d = os.path.join(OUT, "llama_tiny_bnb4"); shutil.rmtree(d, ignore_errors=True); m.save_pretrained(d)
    pm = get_peft_model(m, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")); pm.train()
    lp = {k: p for k, p in pm.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for i, (k, p) in enumerate(sorted(lp.items())): p.copy_((torch.rand(*p.shape, generator=G(1300 + i)) * 2 - 1) / math.sqrt(p.shape[1]) if "lora_A" in k else randn(1300 + i, *p.shape) * .05)
    pm.peft_config["default"].base_model_name_or_path = "llama_tiny_bnb4"
    da = os.path.join(OUT, "llama_tiny_adapter"); shutil.rmtree(da, ignore_errors=True); pm.save_pretrained(da); os.remove(os.path.join(da, "README.md"))
    ids = torch.randint(0, 64, (2, 12), generator=G(1400)); lab = ids.clone(); lab[:, :4] = -100; lab[1, 10:] = -100
    o = pm(input_ids=ids, labels=lab); o.loss.backward()
    t = {"input_ids": ids.to(torch.int32), "labels": lab.to(torch.int32), "logits": o.logits, "loss": o.loss.reshape(1)}
    for k, p in lp.items(): t["grad/" + k.replace(".default.weight", ".weight")] = p.grad
    with torch.no_grad(), pm.disable_adapter(): t["logits_base_only"] = pm(input_ids=ids).logits
    # rank-b evaluation with alpha/b scaling (DyLoRA inference)
    for b in (1, 4):
        saved = {k: p.detach().clone() for k, p in lp.items()}
        with torch.no_grad():
            for k, p in lp.items():
                if "lora_A" in k: p[b:] = 0
                else: p[:, b:] = 0; p.mul_(8 / b)          # alpha/r -> alpha/b
            t[f"logits_dylora_b{b}"] = pm(input_ids=ids).logits
            for k, p in lp.items(): p.copy_(saved[k])
    save("llama_tiny_io.safetensors", t, "tiny Llama (2 layers, d64, GQA 4/2, ffn128, vocab64, eager attention, fp32 compute) NF4+DQ base + peft LoRA r8 a16 on all 7 linears: logits, CE loss (HF shift, -100 ignored, mean), grads of every A/B, base-only logits, DyLoRA rank-1/4 logits")
    for dn in ("llama_tiny_bnb4", "llama_tiny_adapter"):
        for f in sorted(os.listdir(os.path.join(OUT, dn))): note(f"{dn}/{f}", "written by " + ("transformers.save_pretrained (quantised)" if dn.endswith("bnb4") else "peft.save_pretrained"))

# ----------------------------------------------------------------------------- containers
def containers():
    t = {"f32": randn(1500, 2, 3), "f16": randn(1501, 4).to(torch.float16), "bf16": randn(1502, 5).to(torch.bfloat16), "i64": torch.arange(3), "i32": torch.arange(3, dtype=torch.int32), "u8": torch.arange(7, dtype=torch.uint8),
         "i8": torch.arange(-3, 2, dtype=torch.int8), "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "f64": torch.tensor([math.pi], dtype=torch.float64), "unicode \u00e9\"\\\n/k": torch.ones(1), "f8e4m3": torch.tensor([1.5]).to(torch.float8_e4m3fn)}
    save("container_edge.safetensors", t, "safetensors edge cases: many dtypes, scalar [], empty tensor, escaped/unicode key, __metadata__", {"note": "caf\u00e9 \"quoted\" \\ backslash", "n": "1"})
    w = gguf.GGUFWriter(os.path.join(OUT, "tiny.gguf"), "llama"); w.add_uint8("t.u8", 200); w.add_int8("t.i8", -5); w.add_uint16("t.u16", 60000); w.add_int16("t.i16", -300); w.add_uint32("t.u32", 4000000000); w.add_int32("t.i32", -7); w.add_float32("t.f32", 0.5)
    w.add_bool("t.bool", True); w.add_string("t.str", "h\u00e9llo"); w.add_array("t.arr_i32", [1, 2, 3]); w.add_array("t.arr_str", ["a", "bc"]); w.add_uint64("t.u64", 2**40); w.add_int64("t.i64", -2**40); w.add_float64("t.f64", 0.25)
    X = randn(1600, 4, 64).numpy(); exp = {"x": torch.from_numpy(X)}
    from gguf import GGMLQuantizationType as Q
    for q in (Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q8_0):
        d = gguf.quants.quantize(X, q); w.add_tensor("t." + q.name.lower(), d, raw_dtype=q); exp[q.name.lower()] = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(d, q)).astype(np.float32).reshape(4, 64))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close(); note("tiny.gguf", "GGUF v3 by gguf-py: every metadata type, six tensors of shape [4,64] (ne = 64,4)")
    save("tiny_gguf_expected.safetensors", exp, "source x and dequantised value of each tensor in tiny.gguf")

# ----------------------------------------------------------------------------- error statistics
def qerr():
    n = 1 << 20; x = randn(1700, n).reshape(-1, 64); am = x.abs().amax(1, keepdim=True); s = x / am; res = {}
    def near(cb):
        cb = torch.sort(torch.tensor(cb, dtype=torch.float32)).values; return cb[torch.bucketize(s, (cb[1:] + cb[:-1]) / 2)] * am
    ocp = [0, .5, 1, 1.5, 2, 3, 4, 6]
    cbs = {"NF4": NF4.tolist(), "FP4 bnb (0,.0625,2,3,4,6,8,12)/12": FP4.unique().tolist(), "FP4 E2M1 OCP": [v / 6 for v in ocp] + [-v / 6 for v in ocp[1:]], "FP4 E3M0 (0,2^-6..1)": [0] + [2.0 ** -i for i in range(7)] + [-2.0 ** -i for i in range(7)],
           "INT4 sym -7..7": [i / 7 for i in range(-7, 8)], "INT4 -8..7 (/8)": [i / 8 for i in range(-8, 8)], "AF4-64": F.get_4bit_type("af4", device="cpu").tolist()}
    for k, cb in cbs.items():
        e = near(cb) - x; res[k] = {"mse": float((e ** 2).mean()), "mae": float(e.abs().mean()), "sqnr_db": float(10 * torch.log10((x ** 2).mean() / (e ** 2).mean()))}
    off = am.mean(); q, a2 = ref_q8_fast((am - off).flatten(), 256); amd = (DYN_S[q.long()] * a2.repeat_interleave(256)[:q.numel()] + off).reshape(-1, 1)
    cb = NF4; e = cb[torch.bucketize(s, NF4_THR)] * amd - x; res["NF4 + DQ"] = {"mse": float((e ** 2).mean()), "mae": float(e.abs().mean()), "sqnr_db": float(10 * torch.log10((x ** 2).mean() / (e ** 2).mean())), "absmax_rel_err_mean": float(((amd - am) / am).abs().mean())}
    dump("quant_error_normal.json", {"setup": "N(0,1), 2^20 samples, blocksize 64, absmax scaling, nearest code", "results": res}, "quantisation error of 4-bit types on normal weights")
def ref_q8_fast(x, bs):
    m = x.reshape(-1, bs).abs().amax(1) if x.numel() % bs == 0 else torch.stack([c.abs().max() for c in x.split(bs)]); s = x / m.repeat_interleave(bs)[:x.numel()]
    return torch.bucketize(s, (DYN_S[1:] + DYN_S[:-1]) / 2).to(torch.uint8), m

if __name__ == "__main__":
    for f in (codes, q4, q8, nested, linear4bit, lora, dylora_train, adamw, adamw8, peft_linear, peft_llama, containers, qerr):
        print("..", f.__name__, flush=True); f()
    MAN["total_bytes"] = sum(v["bytes"] for v in MAN["files"].values())
    with open(os.path.join(OUT, "MANIFEST.json"), "w") as fh: json.dump(MAN, fh, indent=1, sort_keys=True)
    print("total", MAN["total_bytes"])
