# Times torch.nn.functional.scaled_dot_product_attention on shapes given as JSON; a JSON line for each.
import json, sys
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

def median(call, copies, runs=9, each=1):
    for i in range(2):
        call(i % copies)
    torch.cuda.synchronize()
    times, n = [], 0
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(each):
            call(n % copies)
            n += 1
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / each)
    return sorted(times)[len(times) // 2]

work = json.loads(sys.argv[1])
torch.manual_seed(1)
for s in work["shapes"]:
    for tokens in work["tokens"]:
        h, g, d = s["kv_heads"], s["group"], s["dim"]
        size = tokens * h * d * 4
        copies = max(1, min(64, -(-240_000_000 // size)))
        if size * copies * 1.2 + (2 << 30) > torch.cuda.mem_get_info()[0]:
            continue
        make = lambda heads, n: torch.randn(1, heads, n, d, device="cuda", dtype=torch.float16)
        kv = [(make(h, tokens), make(h, tokens)) for _ in range(copies)]
        more = {"enable_gqa": True} if g > 1 else {}
        for what, n in [("decode", 1), ("prefill", work["queries"])]:
            if what not in work["what"]:
                continue
            q = make(h * g, n)
            try:
                each = max(1, min(50, 3_000_000_000 // size)) if n == 1 else 1
                seconds = median(lambda i: sdpa(q, kv[i][0], kv[i][1], **more), copies, 9 if n == 1 else 5, each)
            except RuntimeError as e:
                print(json.dumps({"what": what, "shape": s["name"], "tokens": tokens, "error": str(e)[:200]}), flush=True)
                continue
            print(json.dumps({"what": what, "shape": s["name"], "tokens": tokens, "seconds": seconds}), flush=True)
        del kv
        torch.cuda.empty_cache()
