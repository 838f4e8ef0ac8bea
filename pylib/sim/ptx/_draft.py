# ruff: noqa
# mypy: ignore-errors
"""ptxsim: functional PTX interpreter on numpy, all lanes of a batch of CTAs at once (prototype for GPU-less tests).

    sim = Sim(ptx_text); sim.launch("kernel", grid=(4,1,1), block=(128,1,1), args=[tensor, 3, 0.5], smem=dynamic_bytes)

* runs the PTX that Triton or nvcc really emitted (target sm_70..sm_80 style; also sm_90+ code without wgmma/TMA/tcgen05)
* SIMT by min-PC: divergent lanes reconverge at the lowest pc; bar.sync blocks a CTA's lanes until all arrived
* global memory is an arena with red zones: out-of-bounds and misaligned accesses raise with kernel source line
* counts executed warp instructions, global sectors (32 B), shared-memory wavefronts (bank conflicts), mma flops
"""

import re, collections, numpy as np

np.seterr(all="ignore")
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
BASE, SHW, LOW = (
    0x7F0000000000,
    0x10_0000_0000,
    0x20_0000_0000,
)  # global arena base; generic windows of shared and local
NP = {
    "b8": U8,
    "u8": U8,
    "s8": np.int8,
    "b16": U16,
    "u16": U16,
    "s16": np.int16,
    "b32": U32,
    "u32": U32,
    "s32": np.int32,
    "b64": U64,
    "u64": U64,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": U16,
    "f16x2": U32,
    "bf16x2": U32,
    "pred": np.bool_,
    "tf32": U32,
    "e4m3x2": U16,
    "e5m2x2": U16,
    "f32x2": U64,
    "b128": U64,
}
UN = {1: U8, 2: U16, 4: U32, 8: U64}


def bf2f(u):
    return (u.astype(U32) << U32(16)).view(np.float32)


def f2bf(f):
    u = np.ascontiguousarray(f, np.float32).view(U32)
    r = ((u >> U32(16)) & U32(1)) + U32(0x7FFF)
    return np.where(np.isnan(f), U16(0x7FFF), ((u + r) >> U32(16)).astype(U16))


def rna_tf32(f):
    return ((f.view(U32) + U32(0x1000)) & U32(0xFFFFE000)).view(np.float32)


class _FP8(dict):
    def __missing__(self, k):
        import torch

        self[k] = (
            torch.arange(256, dtype=torch.uint8)
            .view({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[k])
            .float()
            .numpy()
        )
        return self[k]


FP8 = _FP8()


class PTXError(Exception):
    pass


Ins = collections.namedtuple("Ins", "guard neg op args loc text")


class Sim:
    def __init__(self, ptx):
        self.files = dict(re.findall(r"\.file\s+(\d+)\s+\"([^\"]*)\"", ptx))
        ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
        ptx = re.sub(r"//[^\n]*", "", ptx)
        self.glob, self.entries = {}, {}
        for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx):
            i, d = m.end(), 1
            while d:
                c = ptx[i]
                d += (c == "{") - (c == "}")
                i += 1
            self.entries[m.group(1)] = (m.group(2), m.group(3), ptx[m.end() : i - 1])
        top = re.sub(r"\.entry.*", "", ptx, flags=re.S)
        self.shared_ext = re.findall(
            r"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)\s*\[\s*\]", ptx
        )
        self.const = np.zeros(0, U8)
        self.constaddr = {}
        for m in re.finditer(
            r"\.(global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*(\{[^}]*\}|[^;]+))?;",
            top,
        ):
            _, ty, name, n, init = m.groups()
            dt = NP[ty]
            n = int(n or 1)
            vals = (
                [self._imm(x.strip(), dt) for x in re.split(r",", init.strip("{} "))]
                if init
                else []
            )
            a = np.zeros(n, dt)
            a[: len(vals)] = vals
            self.glob[name] = a
        self.module_shared = {}
        for m in re.finditer(
            r"(?<!extern )\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\[(\d+)\]", top
        ):
            self.module_shared[m.group(3)] = (
                int(m.group(1) or 16),
                int(m.group(4)) * np.dtype(NP[m.group(2)]).itemsize,
            )

    @staticmethod
    def _imm(s, dt):
        s = s.strip()
        if s.startswith("0f"):
            return np.array([int(s[2:], 16)], U32).view(np.float32)[0]
        if s.startswith("0d"):
            return (
                np.array([int(s[2:], 16)], U64)
                .view(np.float64)[0]
                .astype(dt if np.dtype(dt).kind == "f" else np.float64)
            )
        if np.dtype(dt).kind == "f" and not re.match(r"-?(0x)?[0-9A-Fa-f]+U?$", s):
            return dt(float(s))
        v = int(s.rstrip("U"), 0)
        n = np.dtype(dt).itemsize
        if np.dtype(dt).kind == "b":
            return np.bool_(v != 0)
        if np.dtype(dt).kind == "f":
            return np.array([v & (2 ** (8 * n) - 1)], UN[n]).view(dt)[0]
        return np.array([v & (2 ** (8 * n) - 1)], UN[n]).view(dt)[0]

    def _parse(self, name):
        params, direct, body = self.entries[name]
        self.params = []
        off = 0
        for p in [x for x in params.split(",") if x.strip()]:
            m = re.search(r"\.(?:align\s+(\d+)\s+)?", p)
            t = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)", p)
            nm = re.search(r"([\w$]+)(?:\[(\d+)\])?\s*$", p.strip())
            sz = np.dtype(NP[t.group(2)]).itemsize * int(nm.group(2) or 1)
            al = int(t.group(1) or sz)
            off = (off + al - 1) // al * al
            self.params.append((nm.group(1), off, sz))
            off += sz
        self.psize = off
        self.regs, self.shared, self.local = {}, dict(self.module_shared), {}
        ins, labels, loc = [], {}, None
        scope = []
        rename = [{}]
        toks = re.findall(
            r"\s+|\.loc\s[^\n]*|\.file[^\n]*|\.section.*|\{|\}|[$\w%.]+:(?!:)|[^;{}]*(?:\{[^{};]*\}[^;{}]*)*;",
            body,
        )
        nscope = 0
        for t in toks:
            t = t.strip()
            if not t or t == ";":
                continue
            if re.match(r"\.loc\s", t):
                loc = t.split()[1:3]
                continue
            if t.startswith((".file", ".section", ".pragma", ".b8", ".b32", ".b64")):
                continue
            if t == "{":
                nscope += 1
                rename.append(dict(rename[-1]))
                continue
            if t == "}":
                rename.pop()
                continue
            t = t.rstrip(";").strip()
            m = re.match(r"^((?:[$\w%.]+):)(?!:)\s*(.*)$", t, re.S)
            if m and not t.startswith("."):
                labels[rename[-1].get(m.group(1)[:-1], m.group(1)[:-1])] = len(ins)
                t = m.group(2).strip()
            if not t:
                continue
            m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", t, re.S)
            if m:
                for r in m.group(2).split(","):
                    r = r.strip()
                    q = re.match(r"([%\w$]+)<(\d+)>", r)
                    names = [f"{q.group(1)}{i}" for i in range(int(q.group(2)))] if q else [r]
                    for n in names:
                        k = n if len(rename) == 1 else f"{n}@{nscope}"
                        if len(rename) > 1:
                            rename[-1][n] = k
                        self.regs[k] = NP[m.group(1)]
                continue
            m = re.match(
                r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", t
            )
            if m:
                (self.shared if m.group(1) == "shared" else self.local)[m.group(4)] = (
                    int(m.group(2) or 8),
                    int(m.group(5) or 1) * np.dtype(NP[m.group(3)]).itemsize,
                )
                continue
            if t.startswith("."):
                continue
            m = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", t, re.S)
            if not m:
                raise PTXError("parse: " + t)
            neg, g, op, rest = m.groups()
            if len(rename) > 1:
                ren = rename[-1]
                rest = re.sub(r"[%\w$]+", lambda k: ren.get(k.group(0), k.group(0)), rest)
                g = ren.get(g, g)
            args, d, cur = [], 0, ""
            for c in rest:
                if c in "{[(":
                    d += 1
                if c in "}])":
                    d -= 1
                if c == "," and d == 0:
                    args.append(cur.strip())
                    cur = ""
                else:
                    cur += c
            if cur.strip():
                args.append(cur.strip())
            ins.append(Ins(g, neg == "!", op.split("."), args, loc, t))
        self.ins, self.labels = ins, labels
        lead = {0} | set(labels.values())
        for i, x in enumerate(ins):
            if x.op[0] in ("bra", "ret", "exit", "bar", "barrier", "trap"):
                lead.add(i + 1)
        self.leaders = sorted(lead)

    # ---- launch -------------------------------------------------------------------------------------------------
    def launch(self, name, grid, block, args, smem=0, batch=64, count=True, racecheck="raise"):
        self._parse(name)
        self.count = count
        self.block = block
        self.racecheck = racecheck
        import torch

        tens = {}
        size = 4096

        def reg(t):
            nonlocal size
            st = t.untyped_storage()
            k = st.data_ptr()
            if k not in tens:
                tens[k] = (size, st.nbytes(), t)
                size += (st.nbytes() + 511) // 256 * 256 + 256
            return BASE + tens[k][0] + (t.data_ptr() - k)

        vals = [reg(a) if isinstance(a, torch.Tensor) else a for a in args]
        gaddr = {}
        for n, a in self.glob.items():
            gaddr[n] = size
            size += (a.nbytes + 511) // 256 * 256
        self.arena = np.zeros(size + 4096, U8)
        self.valid = np.zeros(size + 4096, np.bool_)
        self.gaddr = {n: BASE + o for n, o in gaddr.items()}
        for n, o in gaddr.items():
            self.arena[o : o + self.glob[n].nbytes] = self.glob[n].view(U8)
            self.valid[o : o + self.glob[n].nbytes] = True
        raw = {}
        for k, (o, n, t) in tens.items():
            import ctypes

            raw[k] = (
                np.frombuffer((ctypes.c_uint8 * n).from_address(k), U8) if n else np.zeros(0, U8)
            )
            self.arena[o : o + n] = raw[k]
            self.valid[o : o + n] = True
        self.pbuf = np.zeros(max(self.psize, 8) + 16, U8)
        vals = vals + [0] * (len(self.params) - len(vals))  # triton appends scratch pointers
        for (n, o, s), v in zip(self.params, vals):
            if isinstance(v, float):
                b = np.array([v], {4: np.float32, 8: np.float64}[s]).view(U8)
            elif isinstance(v, (bytes, bytearray)):
                b = np.frombuffer(v, U8)
            else:
                b = np.array([int(v) & (2 ** (8 * s) - 1)], UN[s]).view(U8)
            self.pbuf[o : o + s] = b
        self.stats = collections.Counter()
        off = 0
        self.saddr = {}
        for n, (al, sz) in self.shared.items():
            off = (off + al - 1) // al * al
            self.saddr[n] = off
            off += sz
        off = (off + 127) // 128 * 128
        for n in self.shared_ext:
            self.saddr[n] = off
        self.ssize = (off + smem + 255) // 256 * 256
        lo = 0
        self.laddr = {}
        for n, (al, sz) in self.local.items():
            lo = (lo + al - 1) // al * al
            self.laddr[n] = lo
            lo += sz
        self.lsize = (lo + 15) // 16 * 16
        ncta = grid[0] * grid[1] * grid[2]
        per = block[0] * block[1] * block[2]
        self.per = (per + 31) // 32 * 32
        self.real = per
        for c0 in range(0, ncta, batch):
            self._run(np.arange(c0, min(c0 + batch, ncta)), grid, block)
        for k, (o, n, t) in tens.items():
            if n:
                raw[k][:] = self.arena[o : o + n]
        return self.stats

    def _run(self, ctas, grid, block):
        n = len(ctas)
        T = n * self.per
        self.T = T
        tid = np.tile(np.arange(self.per), n)
        c = np.repeat(ctas, self.per)
        self.cta = np.repeat(np.arange(n), self.per)
        S = {
            "%tid.x": tid % block[0],
            "%tid.y": tid // block[0] % block[1],
            "%tid.z": tid // (block[0] * block[1]),
            "%ctaid.x": c % grid[0],
            "%ctaid.y": c // grid[0] % grid[1],
            "%ctaid.z": c // (grid[0] * grid[1]),
            "%laneid": tid % 32,
            "%warpid": tid // 32,
        }
        for i, a in enumerate("xyz"):
            S["%ntid." + a] = np.full(T, block[i])
            S["%nctaid." + a] = np.full(T, grid[i])
            S["%cluster_ctaid." + a] = np.zeros(T)
            S["%cluster_nctaid." + a] = np.ones(T)
        S["%clock"] = S["%clock64"] = S["%globaltimer"] = S["%smid"] = S["%cluster_ctarank"] = (
            np.zeros(T)
        )
        self.S = {k: v.astype(U32) for k, v in S.items()}
        self.R = {k: np.zeros(T, d) for k, d in self.regs.items()}
        self.sm = np.zeros(n * self.ssize, U8)
        self.lm = np.zeros(T * self.lsize, U8)
        nwd = n * self.ssize // 4 + 1
        self.epoch = np.ones(n, np.int32)
        self.wE, self.rE = np.zeros(nwd, np.int32), np.zeros(nwd, np.int32)
        self.wW, self.rW = np.full(nwd, -1, np.int32), np.full(nwd, -1, np.int32)
        self.warp = ((np.arange(T) % self.per) // 32).astype(np.int32)
        self.cpq, self.cpg = [], np.zeros(T, np.int32)
        self.races = []
        self.sbase = (self.cta * self.ssize).astype(np.int64)
        self.lbase = (np.arange(T) * self.lsize).astype(np.int64)
        fns = [self._compile(x) for x in self.ins]
        END = len(self.ins)
        pc = np.zeros(T, np.int32)
        pc[tid >= self.real] = END
        wait = np.zeros(T, np.bool_)
        nxt = {a: b for a, b in zip(self.leaders, self.leaders[1:] + [END])}
        live = pc < END
        steps = 0
        while True:
            run = live & ~wait
            if not run.any():
                if not live.any():
                    break
                # a CTA's barrier opens when every live lane of it waits
                wait[:] = False
                self.stats["barrier"] += 1
                continue
            p = int(pc[run].min())
            mask = run & (pc == p)
            e = nxt[p] if p in nxt else min(x for x in self.leaders + [END] if x > p)
            full = bool(mask.all())
            self.mask = None if full else mask
            self.nw = len(mask) // 32 if full else int(mask.reshape(-1, 32).any(1).sum())
            i = p
            pc[mask] = e
            while i < e:
                x = self.ins[i]
                k = x.op[0]
                if k in ("bra", "ret", "exit", "bar", "barrier", "trap"):
                    g = mask if x.guard is None else mask & (self.R[x.guard] ^ x.neg)
                    if k == "bra":
                        pc[g] = self.labels[x.args[0]]
                    elif k in ("ret", "exit"):
                        pc[g] = END
                    elif k == "trap" and g.any():
                        raise PTXError("trap at %s" % (x.loc,))
                    elif (
                        k in ("bar", "barrier")
                        and x.op[1] not in ("warp",)
                        and "arrive" not in x.op
                    ):
                        wait[g] = True
                    self.stats["inst." + k] += self.nw
                else:
                    try:
                        fns[i]()
                    except PTXError:
                        raise
                    except Exception as ex:
                        raise PTXError(
                            f"{type(ex).__name__}: {ex} in `{x.text}` line {x.loc}"
                        ) from ex
                i += 1
            live = pc < END
            wait &= live
            if wait.any():  # per-CTA barrier release
                w = (wait | ~live).reshape(-1, self.per).all(1)
                if w.any():
                    self.epoch[w & wait.reshape(-1, self.per).any(1)] += 1
                    wait.reshape(-1, self.per)[w] = False

    def _race(self, ix, nb, act, x, kind):
        """shared-memory hazards between warps of a CTA with no barrier in between (racecheck)"""
        lanes = np.flatnonzero(act)
        w0 = ix[lanes] // 4
        ep, wp = self.epoch[self.cta[lanes]], self.warp[lanes]
        for j in range(max(1, nb // 4)):
            w = w0 + j
            hw = (self.wE[w] == ep) & (self.wW[w] != wp)
            if kind == "issue":
                bad = hw | (
                    (self.rE[w] == ep) & (self.rW[w] != wp)
                )  # cp.async may land as early as its issue: WAR/WAW now, RAW at the wait
            elif kind == "ld":
                bad = hw
                self.rE[w] = ep
                self.rW[w] = np.where(
                    (self.rE[w] == ep) & (self.rW[w] >= 0) & (self.rW[w] != wp), -2, wp
                )
            else:
                bad = hw | ((self.rE[w] == ep) & (self.rW[w] != wp))
                self.wE[w] = ep
                self.wW[w] = wp
            if bad.any():
                l = lanes[np.flatnonzero(bad)[0]]
                self.races.append((kind, x.text, x.loc, int(self.cta[l]), int(l % self.per)))
                self.stats["races"] += int(bad.sum())
                if self.racecheck == "raise":
                    raise PTXError(
                        f"shared-memory race: {kind} `{x.text}` line {x.loc} cta {self.cta[l]} thread {l % self.per} conflicts with another warp since the last barrier"
                    )

    # ---- operands -----------------------------------------------------------------------------------------------
    def _get(self, a, ty):
        dt = NP[ty]
        n = np.dtype(dt).itemsize
        R = self.R
        if a.startswith("!"):
            f = self._get(a[1:], ty)
            return lambda: ~f()
        if a in R:
            r = R[a]
            if r.dtype == np.bool_:
                return lambda: r
            if r.itemsize == n:
                v = r.view(dt)
                return lambda: v
            if r.itemsize > n:
                return lambda: r.astype(UN[n]).view(dt)
            return lambda: r.astype(UN[n]).view(dt)
        if a in self.S:
            s = self.S[a]
            return lambda: s.astype(UN[n]).view(dt)
        for d, b in ((self.gaddr, 0), (self.saddr, 0), (self.laddr, 0)):
            if a in d:
                v = np.array([d[a]], U64).astype(UN[n])[0]
                return lambda: v
        if a == "WARP_SZ":
            return lambda: dt(32)
        v = self._imm(a, dt)
        if ty in ("f16x2", "bf16x2", "bf16"):
            v = NP[ty](v)
        return lambda: v

    def _put(self, a, x):
        if a == "_":
            return lambda v: None
        r = self.R[a]
        g = x.guard
        G = self.R[g] if g else None
        neg = x.neg

        def put(v):
            v = np.asarray(v)
            if r.dtype != np.bool_:
                if v.dtype.itemsize != r.itemsize:
                    v = (
                        v.astype({2: np.int16, 4: np.int32, 8: np.int64}[r.itemsize])
                        if v.dtype.kind == "i"
                        else (v.view(UN[v.dtype.itemsize]) if v.dtype.kind == "f" else v).astype(
                            UN[r.itemsize]
                        )
                    )
                v = (np.ascontiguousarray(v) if v.ndim else v).view(r.dtype)
            m = self.mask
            if G is not None:
                m = (G ^ neg) if m is None else m & (G ^ neg)
            if m is None:
                r[...] = v
            else:
                np.copyto(r, v, where=m)

        return put

    def _m(self, x):
        if x.guard is None:
            return self.mask
        g = self.R[x.guard] ^ x.neg
        return g if self.mask is None else g & self.mask

    def _addr(self, a):
        m = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", a)
        o = int(m.group(2) or "0", 0)
        b = m.group(1)
        if b in self.R:
            r = self.R[b]
            return lambda: r.astype(np.int64) + o
        for d in (self.gaddr, self.saddr, self.laddr):
            if b in d:
                return lambda v=d[b] + o: np.full(self.T, v, np.int64)
        return lambda: np.full(self.T, int(b, 0) + o, np.int64)

    # ---- memory -------------------------------------------------------------------------------------------------
    def _index(self, space, ad, nb, m, x, kind):
        """byte address -> (buffer, byte index)"""
        if space == "generic" and ((ad >= LOW) & (ad < LOW + 2**32)).any():
            space = "local"
            ad = np.where(ad >= LOW, ad - LOW, ad)
        if space == "generic":
            space = "shared" if ((ad >= SHW) & (ad < SHW + 2**24)).any() else "global"
            ad = np.where(ad >= SHW, ad - (SHW if space == "shared" else 0), ad)
        if space == "shared":
            ad = np.where(ad >= SHW, ad - SHW, ad)
            lim, base, buf = self.ssize, self.sbase, self.sm
        elif space == "local":
            lim, base, buf = self.lsize, self.lbase, self.lm
        else:
            ad = ad - BASE
            lim, base, buf = len(self.arena) - 64, 0, self.arena
        if m is not None:
            ad = np.where(m, ad, 0 if space != "global" else -1)
        act = np.ones(len(ad), np.bool_) if m is None else m
        if not act.any():
            return buf, None
        bad = act & ((ad < 0) | (ad + nb > lim) | (ad % nb != 0))
        if space == "global" and not bad.any():
            q = np.where(act, ad, 0)
            bad = act & ~(self.valid[q] & self.valid[q + nb - 1])
        if bad.any():
            l = int(np.flatnonzero(bad)[0])
            raise PTXError(
                f"{'misaligned' if (ad[l] % nb) else 'out-of-bounds'} {space} {kind} of {nb} B at offset {int(ad[l])} by cta {self.cta[l]} thread {l % self.per}: `{x.text}` line {x.loc} ({int(bad.sum())} lanes)"
            )
        if self.count:
            w = np.where(act, ad, -1).reshape(-1, 32)
            if space == "global":
                s = np.sort(w >> 5, 1)
                sec = ((s[:, 1:] != s[:, :-1]) & (s[:, 1:] >= 0)).sum() + (s[:, 0] >= 0).sum()
                sec = max(int(sec), 0)
                sec = sec * max(1, nb // 32) if nb >= 32 else sec
                self.stats[f"gl.{kind}.sectors"] += int(sec)
                self.stats[f"gl.{kind}.bytes"] += int(act.sum()) * nb
                self.stats[f"gl.{kind}.req"] += int((w >= 0).any(1).sum())
            elif space == "shared":
                k = max(1, nb // 4)  # 16 B: quarter-warp phases of 8 lanes
                ww = w if nb <= 4 else w.reshape(-1, 32 // k)
                ok = ww >= 0
                wave = 0
                bank = (ww // 4) % 32
                word = ww // 4
                for row_b, row_w, row_ok in (
                    (bank[i], word[i], ok[i]) for i in range(0, len(ww), max(1, len(ww) // 16))
                ):  # sampled
                    if row_ok.any():
                        u = np.unique(row_w[row_ok])
                        wave = max(wave, np.bincount(u % 32).max())
                self.stats["sm.req"] += int(ok.any(1).sum())
                self.stats["sm.wavefronts"] += int(ok.any(1).sum()) * int(wave)
        if space == "shared" and self.racecheck and kind in ("ld", "st"):
            self._race(ad + base, nb, act, x, kind)
        return buf, (ad + base)

    def _load(self, space, ad, dt, k, m, x):
        n = np.dtype(dt).itemsize
        buf, ix = self._index(space, ad, n * k, m, x, "ld")
        if ix is None:
            return [np.zeros(self.T, dt)] * k
        if m is not None:
            ix = np.where(m, ix, 0)
        v = buf[: len(buf) // n * n].view(dt)
        return [v[ix // n + j] for j in range(k)]

    def _store(self, space, ad, vals, dt, m, x):
        n = np.dtype(dt).itemsize
        buf, ix = self._index(space, ad, n * len(vals), m, x, "st")
        if ix is None:
            return
        v = buf[: len(buf) // n * n].view(dt)
        for j, s in enumerate(vals):
            s = (
                np.broadcast_to(s, (self.T,)).astype(dt)
                if np.asarray(s).dtype != dt
                else np.broadcast_to(s, (self.T,))
            )
            if m is None:
                v[ix // n + j] = s
            else:
                v[ix[m] // n + j] = s[m]

    @staticmethod
    def _vec(a):
        return [q.strip() for q in a.strip("{} ").split(",")] if a.startswith("{") else [a]

    # ---- instructions -------------------------------------------------------------------------------------------
    def _compile(self, x):
        f = self._compile1(x)
        key = "inst." + ".".join(x.op[:1] if x.op[0] not in ("mma", "ld", "st", "cp") else x.op[:2])

        def g():
            self.stats[key] += self.nw
            f()

        return g if self.count else f

    def _compile1(self, x):
        op, a = x.op, x.args
        k = op[0]
        ty = op[-1]
        P = lambda i=0: self._put(a[i], x)
        G = lambda i, t=ty: self._get(a[i], t)
        if k in ("bra", "ret", "exit", "bar", "barrier", "trap"):
            return lambda: None
        if k in (
            "membar",
            "fence",
            "prefetch",
            "prefetchu",
            "discard",
            "griddepcontrol",
            "nanosleep",
            "pmevent",
            "applypriority",
            "setmaxnreg",
        ):
            return lambda: None
        if k == "createpolicy":
            return lambda: None
        if k == "mov":
            d, s = a
            if d.startswith("{"):
                ds = self._vec(d)
                w = np.dtype(NP[ty]).itemsize // len(ds)
                g = G(1)
                ps = [self._put(q, x) for q in ds]

                def f():
                    v = (
                        np.ascontiguousarray(np.broadcast_to(g(), (self.T,)))
                        .view(UN[w])
                        .reshape(self.T, len(ds))
                    )
                    for j, p in enumerate(ps):
                        p(np.ascontiguousarray(v[:, j]))

                return f
            if s.startswith("{"):
                ss = self._vec(s)
                w = np.dtype(NP[ty]).itemsize // len(ss)
                gs = [self._get(q, {1: "b8", 2: "b16", 4: "b32"}[w]) for q in ss]
                p = P()
                return lambda: p(
                    np.ascontiguousarray(
                        np.stack([np.broadcast_to(g(), (self.T,)) for g in gs], 1)
                    ).view(UN[w * len(ss)])[:, 0]
                )
            p, g = P(), G(1)
            return lambda: p(g())
        if k == "cvta":
            p, g = P(), G(1)
            if "shared" in op:
                return (
                    (lambda: p((g().astype(U64) - U64(SHW)) & U64(2**32 - 1)))
                    if "to" in op
                    else (lambda: p(np.broadcast_to(g(), (self.T,)).astype(U64) + U64(SHW)))
                )
            if "local" in op:
                return (
                    (lambda: p(g().astype(U64) - U64(LOW)))
                    if "to" in op
                    else (lambda: p(np.broadcast_to(g(), (self.T,)).astype(U64) + U64(LOW)))
                )
            return lambda: p(g())
        if k in ("ld", "ldu"):
            sp = next(
                (
                    q.split("::")[0]
                    for q in op
                    if q.split("::")[0] in ("global", "shared", "local", "param", "const")
                ),
                "generic",
            )
            sp = {"const": "global"}.get(sp, sp)
            ds = self._vec(a[0])
            dt = NP[ty]
            ps = [self._put(q, x) for q in ds]
            if sp == "param":
                m = re.match(r"\[([\w$]+)(?:\+(\d+))?\]", a[1])
                o = dict((n, o) for n, o, s in self.params)[m.group(1)] + int(m.group(2) or 0)
                n = np.dtype(dt).itemsize
                vals = [self.pbuf[o + j * n : o + (j + 1) * n].view(dt)[0] for j in range(len(ds))]

                def f():
                    for p, v in zip(ps, vals):
                        p(v)

                return f
            ad = self._addr(a[1])

            def f():
                for p, v in zip(ps, self._load(sp, ad(), dt, len(ps), self._m(x), x)):
                    p(v)

            return f
        if k == "st":
            sp = next(
                (
                    q.split("::")[0]
                    for q in op
                    if q.split("::")[0] in ("global", "shared", "local", "param")
                ),
                "generic",
            )
            ad = self._addr(a[0])
            gs = [self._get(q, ty) for q in self._vec(a[1])]
            dt = NP[ty]
            return lambda: self._store(sp, ad(), [g() for g in gs], dt, self._m(x), x)
        if k == "cp" and op[1] == "async":
            if op[2] == "commit_group":

                def f():
                    m = self._m(x)
                    self.cpg += 1 if m is None else m

                return f
            if op[2] in (
                "wait_group",
                "wait_all",
            ):  # the copy lands only here: a missing or too weak wait shows as stale data
                keep = int(a[0], 0) if a else -1

                def f():
                    m = self._m(x)
                    m = np.ones(self.T, bool) if m is None else m
                    left = []
                    for grp, em, sad, v, dt, xi in self.cpq:
                        go = em & m & ((grp <= self.cpg - keep - 1) if keep >= 0 else True)
                        if go.any():
                            self._store("shared", sad, v, dt, go, xi)
                        em = em & ~go
                        if em.any():
                            left.append((grp, em, sad, v, dt, xi))
                    self.cpq = left

                return f
            if op[2] == "mbarrier":
                return lambda: None
            sa, ga = self._addr(a[0]), self._addr(a[1])
            nb = int(a[2], 0)
            dt = {4: U32, 8: U64, 16: U64}[nb]
            kk = max(1, nb // 8)
            src = self._get(a[3], "u32") if len(a) > 3 and not a[3].startswith("%rd") else None

            def f():
                m = self._m(x)
                ad = ga()
                if src is not None:
                    n = np.broadcast_to(src(), (self.T,))
                    lm = (n == nb) if m is None else m & (n == nb)
                    part = (n != 0) & (n != nb)
                    if (part if m is None else part & m).any():
                        raise PTXError("cp.async partial src-size not modelled")
                    v = self._load("global", ad, dt, kk, lm, x)
                    v = [np.where(lm, q, 0).astype(dt) for q in v]
                else:
                    v = self._load("global", ad, dt, kk, m, x)
                if self.racecheck:
                    act = np.ones(self.T, bool) if m is None else m
                    sh = sa()
                    sh = np.where(sh >= SHW, sh - SHW, sh)
                    self._race(np.where(act, sh, 0) + self.sbase, nb, act, x, "issue")
                self.cpq.append(
                    (
                        self.cpg.copy(),
                        np.ones(self.T, bool) if m is None else m.copy(),
                        sa(),
                        v,
                        dt,
                        x,
                    )
                )

            return f
        if k == "cvt":
            return self._cvt(x)
        if k in (
            "add",
            "sub",
            "mul",
            "div",
            "rem",
            "min",
            "max",
            "mad",
            "fma",
            "neg",
            "abs",
            "sqrt",
            "rsqrt",
            "rcp",
            "ex2",
            "lg2",
            "sin",
            "cos",
            "tanh",
            "copysign",
        ):
            return self._arith(x)
        if k in ("and", "or", "xor", "not", "shl", "shr", "cnot"):
            p = P()
            g1 = G(1)
            if k == "not":
                return lambda: p(~g1())
            if k == "cnot":
                return lambda: p((g1() == 0))
            if k in ("shl", "shr"):
                g2 = self._get(a[2], "u32")
                w = np.dtype(NP[ty]).itemsize * 8
                dt = NP[ty]

                def f():
                    s = g2()
                    v = g1()
                    sc = np.minimum(s, w - 1).astype(UN[w // 8]).view(dt)
                    r = (v << sc) if k == "shl" else (v >> sc)
                    p(
                        np.where(
                            np.asarray(s) >= w,
                            (
                                np.where(v < 0, dt(-1), dt(0))
                                if np.dtype(dt).kind == "i" and k == "shr"
                                else dt(0)
                            ),
                            r,
                        ).astype(dt)
                    )

                return f
            g2 = G(2)
            fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[k]
            return lambda: p(fn(g1(), g2()))
        if k == "bfe":
            p, g, gp, gl = P(), G(1), self._get(a[2], "u32"), self._get(a[3], "u32")
            n = np.dtype(NP[ty]).itemsize

            def f():
                v = (
                    np.broadcast_to(g(), (self.T,)).astype(np.int64)
                    if ty[0] == "s"
                    else np.broadcast_to(g(), (self.T,)).astype(U64)
                )
                pos = np.broadcast_to(gp(), (self.T,)).astype(np.int64) & 255
                ln = np.broadcast_to(gl(), (self.T,)).astype(np.int64) & 255
                r = (v.astype(U64) >> np.minimum(pos, 63).astype(U64)) & (
                    (U64(1) << np.minimum(ln, 63).astype(U64)) - U64(1)
                )
                if ty[0] == "s":
                    sb = (r >> np.maximum(ln - 1, 0).astype(U64)) & U64(1)
                    r = np.where(
                        sb == 1, r | ~((U64(1) << np.minimum(ln, 63).astype(U64)) - U64(1)), r
                    )
                p(r.astype(UN[n]))

            return f
        if k == "bfi":
            p, g1, g2, gp, gl = P(), G(1), G(2), self._get(a[3], "u32"), self._get(a[4], "u32")
            n = np.dtype(NP[ty]).itemsize

            def f():
                pos = U64(gp()) if np.ndim(gp()) == 0 else gp().astype(U64)
                ln = U64(gl()) if np.ndim(gl()) == 0 else gl().astype(U64)
                mk = ((U64(1) << ln) - U64(1)) << pos
                p(
                    (
                        (np.asarray(g2()).astype(U64) & ~mk)
                        | ((np.asarray(g1()).astype(U64) << pos) & mk)
                    ).astype(UN[n])
                )

            return f
        if k == "lop3":
            p, g1, g2, g3 = P(), G(1), G(2), G(3)
            lut = int(a[4], 0)

            def f():
                A, B, C = g1(), g2(), g3()
                r = np.zeros(self.T, U32)
                for i in range(8):
                    if lut >> i & 1:
                        r |= (A if i & 4 else ~A) & (B if i & 2 else ~B) & (C if i & 1 else ~C)
                p(r)

            return f
        if k == "prmt":
            p, g1, g2, g3 = (
                P(),
                self._get(a[1], "b32"),
                self._get(a[2], "b32"),
                self._get(a[3], "b32"),
            )

            def f():
                A, B, s = (np.broadcast_to(np.asarray(g()), (self.T,)) for g in (g1, g2, g3))
                by = (
                    np.stack([np.ascontiguousarray(A), np.ascontiguousarray(B)], 1)
                    .view(U8)
                    .reshape(self.T, 8)
                )
                r = np.zeros((self.T, 4), U8)
                for i in range(4):
                    q = (s >> U32(4 * i)) & U32(15)
                    v = by[np.arange(self.T), (q & U32(7)).astype(int)]
                    r[:, i] = np.where(q & 8, np.where(v & 128, 255, 0), v)
                p(r.view(U32)[:, 0])

            return f
        if k == "shf":
            p, g1, g2, g3 = P(), G(1, "b32"), G(2, "b32"), G(3, "b32")
            L = op[1] == "l"

            def f():
                v = (np.asarray(g2()).astype(U64) << U64(32)) | np.asarray(g1()).astype(U64)
                s = np.asarray(g3()) & U32(31) if "wrap" in op else np.minimum(g3(), U32(32))
                s = np.asarray(s).astype(U64)
                p(((v << s) >> U64(32)).astype(U32) if L else (v >> s).astype(U32))

            return f
        if k in ("popc", "clz", "brev"):
            p, g = P(), G(1)
            n = np.dtype(NP[ty]).itemsize * 8

            def f():
                v = np.ascontiguousarray(np.broadcast_to(g(), (self.T,)))
                b = np.unpackbits(v.view(U8).reshape(self.T, -1), axis=1, bitorder="little")
                if k == "popc":
                    p(b.sum(1).astype(U32))
                elif k == "clz":
                    p(np.where(b.any(1), np.argmax(b[:, ::-1], 1), n).astype(U32))
                else:
                    p(np.packbits(b[:, ::-1], axis=1, bitorder="little").view(v.dtype)[:, 0])

            return f
        if k in ("setp", "set"):
            cmp = op[1]
            bool_op = op[2] if op[2] in ("and", "or", "xor") else None
            ds = a[0].split("|")
            p = self._put(ds[0].strip(), x)
            q = self._put(ds[1].strip(), x) if len(ds) > 1 else None
            g1, g2 = G(1), G(2)
            c = self._get(a[3], "pred") if len(a) > 3 else None
            FN = {
                "eq": np.equal,
                "ne": np.not_equal,
                "lt": np.less,
                "le": np.less_equal,
                "gt": np.greater,
                "ge": np.greater_equal,
                "lo": np.less,
                "ls": np.less_equal,
                "hi": np.greater,
                "hs": np.greater_equal,
            }
            unord = cmp.endswith("u") and cmp[:-1] in FN and cmp not in ("lu",)

            def f():
                A, B = g1(), g2()
                if ty == "bf16":
                    A, B = bf2f(np.asarray(A)), bf2f(np.asarray(B))
                if cmp == "nan":
                    r = np.isnan(A) | np.isnan(B)
                elif cmp == "num":
                    r = ~(np.isnan(A) | np.isnan(B))
                else:
                    r = FN[cmp[:-1] if unord else cmp](A, B)
                    if unord:
                        r = r | np.isnan(A) | np.isnan(B)
                    elif cmp == "ne" and ty[0] == "f":
                        r = r & ~(np.isnan(A) | np.isnan(B))
                r2 = ~r
                if c is not None:
                    z = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[bool_op]
                    r, r2 = z(r, c()), z(r2, c())
                p(r)
                if q:
                    q(r2)

            return f
        if k == "selp":
            p, g1, g2, c = P(), G(1), G(2), self._get(a[3], "pred")
            return lambda: p(np.where(c(), g1(), g2()))
        if k == "shfl":
            ds = a[0].split("|")
            p = self._put(ds[0].strip(), x)
            q = self._put(ds[1].strip(), x) if len(ds) > 1 else None
            g, gb, gc = G(1), self._get(a[2], "u32"), self._get(a[3], "u32")
            mode = op[2]
            lane = np.arange(self.T) % 32
            wb = np.arange(self.T) // 32 * 32

            def f():
                v = np.broadcast_to(g(), (self.T,))
                b = np.broadcast_to(gb(), (self.T,)).astype(np.int64)
                c = np.broadcast_to(gc(), (self.T,)).astype(np.int64)
                seg = (c >> 8) & 31
                mx = (lane & seg) | (c & 31 & ~seg)
                mn = lane & seg
                b = b & 31
                j = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": mn | (b & ~seg)}[
                    mode
                ]
                ok = (j >= mx) if mode == "up" else (j <= mx)
                s = np.where(ok, j, lane)
                p(v[wb + s])
                if q:
                    q(ok)

            return f
        if k in ("vote", "match", "redux"):
            p = P()
            t = "pred" if k == "vote" else ty
            g = G(1, t)
            mode = op[2]

            def f():
                v = np.broadcast_to(g(), (self.T,)).reshape(-1, 32)
                if k == "redux":
                    r = {
                        "add": np.add,
                        "min": np.minimum,
                        "max": np.maximum,
                        "and": np.bitwise_and,
                        "or": np.bitwise_or,
                        "xor": np.bitwise_xor,
                    }[mode].reduce(v, axis=1)
                    p(np.repeat(r.astype(v.dtype), 32))
                    return
                if mode == "ballot":
                    p(np.repeat((v.astype(U64) << np.arange(32, dtype=U64)).sum(1).astype(U32), 32))
                elif mode in ("any", "all"):
                    p(np.repeat(getattr(v, mode)(1), 32))

            return f
        if k == "activemask":
            p = P()
            return lambda: p(
                np.repeat(
                    (
                        (np.ones(self.T, bool) if self.mask is None else self.mask)
                        .reshape(-1, 32)
                        .astype(U64)
                        << np.arange(32, dtype=U64)
                    )
                    .sum(1)
                    .astype(U32),
                    32,
                )
            )
        if k == "elect":
            d, q = [s.strip() for s in a[0].split("|")]
            p = self._put(q, x)

            def f():
                m = np.ones(self.T, bool) if self.mask is None else self.mask
                w = m.reshape(-1, 32)
                r = np.zeros_like(w)
                r[np.arange(len(w)), w.argmax(1)] = w.any(1)
                p(r.reshape(-1))

            return f
        if k in ("ldmatrix", "stmatrix"):
            nm = {"x1": 1, "x2": 2, "x4": 4}[next(q for q in op if q in ("x1", "x2", "x4"))]
            tr = "trans" in op
            regs = self._vec(a[0] if k == "ldmatrix" else a[1])
            ad = self._addr(a[1] if k == "ldmatrix" else a[0])
            if k == "ldmatrix":
                ps = [self._put(q, x) for q in regs]
            else:
                gs = [self._get(q, "b32") for q in regs]

            def f():
                base = ad().reshape(-1, 32)[:, : 8 * nm]
                base = np.where(base >= SHW, base - SHW, base)
                sb = self.sbase.reshape(-1, 32)[:, :1]
                wm = (
                    np.ones(len(base), bool)
                    if self.mask is None
                    else self.mask.reshape(-1, 32).any(1)
                )
                if ((base % 16 != 0) | (base < 0) | (base + 16 > self.ssize))[wm].any():
                    raise PTXError(f"bad ldmatrix address `{x.text}` line {x.loc}")
                ix = np.where(wm[:, None], base, 0) + sb
                h = self.sm.view(U16)
                if self.count:
                    for mtx in range(nm):
                        rows = (base[:, 8 * mtx : 8 * mtx + 8] // 16) % 8
                        srt = np.sort(rows, 1)
                        self.stats["sm.req"] += int(wm.sum())
                        r0 = srt[np.flatnonzero(wm)[0]]
                        self.stats["sm.wavefronts"] += int(wm.sum()) * int(np.bincount(r0).max())
                if self.racecheck:
                    full = np.zeros((len(base), 32), np.int64)
                    full[:, : 8 * nm] = ix
                    am = np.zeros((len(base), 32), bool)
                    am[:, : 8 * nm] = wm[:, None]
                    self._race(
                        full.reshape(-1), 16, am.reshape(-1), x, "ld" if k == "ldmatrix" else "st"
                    )
                el = (ix[:, :, None] // 2 + np.arange(8)).reshape(
                    -1, nm, 8, 8
                )  # warp, matrix, row, col
                if k == "ldmatrix":
                    M = h[el]
                    M = M.swapaxes(2, 3) if tr else M
                    out = np.ascontiguousarray(M.reshape(-1, nm, 32, 2)).view(U32)[
                        ..., 0
                    ]  # lane = row*4 + col/2
                    for j, p in enumerate(ps):
                        p(out[:, j].reshape(-1))
                else:
                    for j, g in enumerate(gs):
                        v = (
                            np.ascontiguousarray(np.broadcast_to(g(), (self.T,)))
                            .view(U16)
                            .reshape(-1, 8, 8)
                        )
                        v = v.swapaxes(1, 2) if tr else v
                        h[el[wm, j]] = v[wm]

            return f
        if k == "mma":
            return self._mma(x)
        if k in ("atom", "red"):
            return self._atom(x)
        if k == "isspacep":
            p, g = P(), self._get(a[1], "u64")
            return lambda: p(
                (g() >= U64(SHW)) & (g() < U64(SHW + 2**24))
                if op[1] == "shared"
                else ~((g() >= U64(SHW)) & (g() < U64(SHW + 2**24)))
            )
        if k == "mapa":
            p, g = P(), G(1)
            return lambda: p(g())
        raise PTXError(f"unsupported instruction `{x.text}` line {x.loc}")

    def _fl(self, a, ty):
        g = self._get(a, ty)
        if ty == "bf16":
            return lambda: bf2f(np.asarray(g()))
        if ty in ("f16x2", "bf16x2"):

            def h():
                v = (
                    np.ascontiguousarray(np.broadcast_to(g(), (self.T,)))
                    .view(U16)
                    .reshape(self.T, 2)
                )
                return bf2f(v) if ty == "bf16x2" else v.view(np.float16)

            return h
        if ty == "f32x2":
            return lambda: (
                np.ascontiguousarray(np.broadcast_to(g(), (self.T,)))
                .view(np.float32)
                .reshape(self.T, 2)
            )
        return g

    def _pk(self, v, ty):
        if ty == "bf16":
            return f2bf(v)
        if ty == "f16x2":
            return np.ascontiguousarray(v.astype(np.float16)).view(U32)[:, 0]
        if ty == "bf16x2":
            return np.ascontiguousarray(f2bf(v)).view(U32)[:, 0]
        if ty == "f32x2":
            return np.ascontiguousarray(v.astype(np.float32)).view(U64)[:, 0]
        return v

    def _arith(self, x):
        op, a, k, ty = x.op, x.args, x.op[0], x.op[-1]
        odd = [
            q
            for q in op[1:]
            if q not in NP
            and q
            not in (
                "rn",
                "rz",
                "rm",
                "rp",
                "approx",
                "full",
                "ftz",
                "sat",
                "relu",
                "NaN",
                "lo",
                "hi",
                "wide",
            )
        ]
        if odd:
            raise PTXError(f"unknown modifier {odd} in `{x.text}` line {x.loc}")
        if k == "fma" or ty in ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "f32x2"):
            mixed = (
                len(op) > 2
                and op[-2] in ("f32", "f64")
                and ty in ("bf16", "f16")
                and k in ("add", "sub", "fma")
            )  # add.rn.f32.bf16 d, a(bf16), c(f32)  (sm_100+)
            p = self._put(a[0], x)
            g = [self._fl(q, ty) for q in a[1:]]
            if mixed:
                g[-1] = self._fl(a[-1], op[-2])
                ty = op[-2]
            dt = np.float64 if ty == "f64" else np.float32
            relu, sat, nanp = "relu" in op, "sat" in op, "NaN" in op
            FN = {
                "add": np.add,
                "sub": np.subtract,
                "mul": np.multiply,
                "div": np.divide,
                "min": np.fmin if not nanp else np.minimum,
                "max": np.fmax if not nanp else np.maximum,
                "copysign": lambda s, m: np.copysign(m, s),
                "neg": np.negative,
                "abs": np.abs,
                "sqrt": np.sqrt,
                "rsqrt": lambda v: 1 / np.sqrt(v),
                "rcp": lambda v: 1 / v,
                "ex2": np.exp2,
                "lg2": np.log2,
                "sin": np.sin,
                "cos": np.cos,
                "tanh": np.tanh,
            }
            if k in ("fma", "mad"):

                def f():
                    A, B, C = (q() for q in g)
                    r = np.asarray(A, np.float64) * np.asarray(B, np.float64) + np.asarray(
                        C, np.float64
                    )
                    r = np.maximum(r, 0) if relu else np.clip(r, 0, 1) if sat else r
                    self.stats["flop.fma"] += 2 * self.nw * 32
                    p(
                        self._pk(
                            r.astype({"f64": np.float64, "f16": np.float16}.get(ty, np.float32)), ty
                        )
                    )

                return f
            fn = FN[k]

            def f():
                v = [np.asarray(q(), dt) if ty != "f64" else q() for q in g]
                r = (
                    fn(fn(v[0], v[1]), v[2]) if len(v) == 3 else fn(*v)
                )  # 3-input min/max on sm_100+
                r = np.clip(r, 0, 1) if sat else r
                p(self._pk(r.astype(np.float16) if ty == "f16" else r, ty))

            return f
        p = self._put(a[0], x)
        g = [self._get(q, ty) for q in a[1:]]
        dt = NP[ty]
        n = np.dtype(dt).itemsize
        wide, hi = "wide" in op, "hi" in op
        W = {
            (2, "i"): np.int32,
            (2, "u"): U32,
            (4, "i"): np.int64,
            (4, "u"): U64,
            (8, "i"): np.int64,
            (8, "u"): U64,
        }[(n, np.dtype(dt).kind)]
        if k in ("mul", "mad"):
            g3 = self._get(a[3], {2: "b32", 4: "b64"}[n] if wide else ty) if k == "mad" else None

            def f():
                A, B = g[0](), g[1]()
                if wide:
                    r = np.asarray(A).astype(W) * np.asarray(B).astype(W)
                elif hi:
                    if n == 8:
                        r = np.array(
                            [
                                ((int(i) * int(j)) >> 64) & (2**64 - 1)
                                for i, j in zip(
                                    np.broadcast_to(A, (self.T,)), np.broadcast_to(B, (self.T,))
                                )
                            ],
                            U64,
                        ).view(dt)
                    else:
                        r = (
                            (np.asarray(A).astype(W) * np.asarray(B).astype(W)) >> W(8 * n)
                        ).astype(dt)
                else:
                    r = np.multiply(A, B, dtype=dt)
                if g3 is not None:
                    c = g3()
                    r = r + (np.asarray(c).view(r.dtype) if wide else c)
                p(r)

            return f
        FN = {
            "add": np.add,
            "sub": np.subtract,
            "min": np.minimum,
            "max": np.maximum,
            "neg": np.negative,
            "abs": np.abs,
        }
        if k in FN:
            fn = FN[k]
            return lambda: p(fn(*[q() for q in g]).astype(dt))

        def f():
            A, B = np.broadcast_to(g[0](), (self.T,)), np.broadcast_to(g[1](), (self.T,))
            Bz = np.where(B == 0, 1, B).astype(dt)
            if np.dtype(dt).kind == "i":
                q = (
                    np.trunc(A.astype(np.float64) / Bz).astype(np.int64)
                    if n < 8
                    else np.array(
                        [
                            int(abs(int(i)) // abs(int(j))) * (1 if (i < 0) == (j < 0) else -1)
                            for i, j in zip(A, Bz)
                        ],
                        np.int64,
                    )
                )
            else:
                q = A // Bz
            q = q.astype(dt)
            p(q if k == "div" else (A - q * Bz).astype(dt))

        return f

    def _cvt(self, x):
        op, a = x.op, x.args
        d, s = op[-2], op[-1]
        p = self._put(a[0], x)
        rnd = next(
            (q for q in op if q in ("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi", "rm", "rp")),
            None,
        )
        sat, relu = "sat" in op, "relu" in op
        if d in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") and len(a) == 3:
            hi, lo = self._get(a[1], "f32"), self._get(a[2], "f32")

            def f():
                v = np.stack(
                    [np.broadcast_to(lo(), (self.T,)), np.broadcast_to(hi(), (self.T,))], 1
                )
                v = np.maximum(v, 0) if relu else v
                p(self._pk(v, d))

            return f
        g = self._fl(a[1], s)
        dt = NP[d]
        flt = lambda t: t in ("f16", "f32", "f64", "bf16", "tf32")

        def f():
            v = np.asarray(g())
            if flt(s) and not flt(d):
                r = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rnd](
                    v.astype(np.float64)
                )
                ii = np.iinfo(dt)
                r = np.where(np.isnan(r), 0, np.clip(r, float(ii.min), float(ii.max)))
                r = np.where(
                    r >= float(ii.max), ii.max, r.astype(np.int64) if dt != U64 else r.astype(U64)
                ).astype(dt)
            elif flt(d):
                if rnd in ("rni", "rzi", "rmi", "rpi"):
                    v = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rnd](v)
                if d == "bf16":
                    r = (
                        f2bf(v.astype(np.float32))
                        if rnd != "rz"
                        else (v.view(U32) >> U32(16)).astype(U16)
                    )
                elif d == "tf32":
                    r = rna_tf32(v).view(U32)
                else:
                    r = v.astype(dt)
                    r = np.clip(r, 0, 1) if sat else r
            else:
                if sat:
                    ii = np.iinfo(dt)
                    v = np.clip(v.astype(np.int64), ii.min, ii.max)
                r = v.astype(dt)
            p(r)

        return f

    def _mma(self, x):
        sh = next(q for q in x.op if re.match(r"m\d+n\d+k\d+$", q))
        M, N, K = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", sh).groups())
        i = x.op.index(sh)
        dty, aty, bty, cty = [q for q in x.op[i + 3 :] if q not in ("satfinite", "kind::f8f6f4")]
        assert (M, N) == (16, 8), x.text
        ps = [self._put(q, x) for q in self._vec(x.args[0])]
        ga = [self._get(q, "b32") for q in self._vec(x.args[1])]
        gb = [self._get(q, "b32") for q in self._vec(x.args[2])]
        gc = [
            self._get(q, "f32" if cty == "f32" else "s32" if cty == "s32" else "b32")
            for q in self._vec(x.args[3])
        ]
        e = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}[
            aty
        ]  # elements per 32-bit reg
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        ra = [(g + 8 * (r % 2), (r // 2) * 4 * e + t * e) for r in range(len(ga))]
        rb = [(r * 4 * e + t * e, g) for r in range(len(gb))]

        def dec(v):
            v = np.ascontiguousarray(np.broadcast_to(v, (self.T,)))
            if aty == "bf16":
                return bf2f(v.view(U16)).reshape(-1, 32, 2)
            if aty == "f16":
                return v.view(np.float16).astype(np.float32).reshape(-1, 32, 2)
            if aty == "tf32":
                return (v & U32(0xFFFFE000)).view(np.float32).reshape(-1, 32, 1)
            if aty in ("e4m3", "e5m2"):
                return FP8[aty][v.view(U8)].reshape(-1, 32, 4)
            return v.view(np.int8 if aty == "s8" else U8).astype(np.float32).reshape(-1, 32, 4)

        def f():
            W = self.T // 32
            A = np.zeros((W, 16, K), np.float32)
            B = np.zeros((W, K, 8), np.float32)
            for (r, c), gg in zip(ra, ga):
                v = dec(gg())
                for j in range(e):
                    A[:, r, c + j] = v[:, :, j]
            for (r, c), gg in zip(rb, gb):
                v = dec(gg())
                for j in range(e):
                    B[:, r + j, c] = v[:, :, j]
            D = A @ B
            self.stats["flop.mma"] += 2 * 16 * 8 * K * self.nw
            self.stats["mma." + sh + "." + aty] += self.nw
            if cty in ("f32", "s32"):
                for r, (p, c) in enumerate(zip(ps, gc)):
                    v = D[:, g + 8 * (r // 2), 2 * t + r % 2].reshape(-1)
                    p(
                        (c() + v).astype(np.float32)
                        if cty == "f32"
                        else (c() + v.astype(np.int32)).astype(np.int32)
                    )
            else:
                for r, (p, c) in enumerate(zip(ps, gc)):
                    cv = (
                        np.ascontiguousarray(np.broadcast_to(c(), (self.T,)))
                        .view(np.float16)
                        .reshape(-1, 32, 2)
                        .astype(np.float32)
                    )
                    v = np.stack([D[:, g + 8 * r, 2 * t], D[:, g + 8 * r, 2 * t + 1]], 2) + cv
                    p(np.ascontiguousarray(v.astype(np.float16)).view(U32).reshape(-1))

        return f

    def _atom(self, x):
        op, a, ty = x.op, x.args, x.op[-1]
        isat = op[0] == "atom"
        sp = next(
            (q.split("::")[0] for q in op if q.split("::")[0] in ("global", "shared")), "generic"
        )
        o = next(
            q
            for q in op
            if q in ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
        )
        ad = self._addr(a[1 if isat else 0])
        vs = a[2:] if isat else a[1:]
        srcs = [self._vec(v) for v in vs]
        nv = len(srcs[0])
        gs = [[self._get(q, ty) for q in s] for s in srcs]
        dst = [self._put(q, x) for q in self._vec(a[0])] if isat else None
        dt = NP[ty]
        n = np.dtype(dt).itemsize

        def add(u, v):
            if ty == "bf16":
                return f2bf(bf2f(np.array([u])) + bf2f(np.array([v])))[0]
            if ty in ("bf16x2", "f16x2"):
                A, B = (np.array([q], U32).view(U16) for q in (u, v))
                return (
                    f2bf(bf2f(A) + bf2f(B))
                    if ty[0] == "b"
                    else (A.view(np.float16) + B.view(np.float16))
                ).view(U32)[0]
            return u + v

        def f():
            m = self._m(x)
            buf, ix = self._index(sp, ad(), n * nv, m, x, "atom")
            if ix is None:
                return
            v = buf[: len(buf) // n * n].view(dt)
            lanes = np.arange(self.T) if m is None else np.flatnonzero(m)
            vals = [[np.broadcast_to(q(), (self.T,)) for q in s] for s in gs]
            old = [np.zeros(self.T, dt) for _ in range(nv)]
            for l in lanes:
                for j in range(nv):
                    k = int(ix[l]) // n + j
                    w = v[k]
                    old[j][l] = w
                    s = vals[0][j][l]
                    v[k] = (
                        add(w, s)
                        if o == "add"
                        else s
                        if o == "exch"
                        else (vals[1][j][l] if w == s else w)
                        if o == "cas"
                        else min(w, s)
                        if o == "min"
                        else max(w, s)
                        if o == "max"
                        else {"and": w & s, "or": w | s, "xor": w ^ s}[o]
                        if o in ("and", "or", "xor")
                        else (0 if w >= s else w + 1)
                    )
            if dst:
                for p, q in zip(dst, old):
                    p(q)

        return f
