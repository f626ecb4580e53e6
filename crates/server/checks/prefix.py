"""How long a first token takes on a long document that is new, and on one that was asked about before. Fails where that is
less than 20 times sooner.
Arguments: the server's URL, a text file, tokens of document (default 7900).

    kvquant serve smollm2-135m --kv nuq3-1%+sink1 &
    python3 crates/server/checks/prefix.py http://127.0.0.1:8080 crates/cli/assets/station.txt
"""
import json
import sys
import time
import urllib.request

url, file, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 7900


def post(path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request)


model = json.load(urllib.request.urlopen(url + "/v1/models"))["data"][0]["id"]
text = open(file).read()
document = " ".join([text] * 20)
# A word takes about 1.3 tokens: cut until it fits.
words = document.split(" ")
while json.load(post("/v1/tokenize", {"model": model, "prompt": document}))["count"] > tokens:
    words = words[: int(len(words) * 0.98)]
    document = " ".join(words)
document = f"Document of {time.time()}\n{document}"


def first_token(question):
    body = {"model": model, "messages": [{"role": "user", "content": f"{document}\n\n{question}"}], "stream": True,
            "max_tokens": 8, "temperature": 0, "stream_options": {"include_usage": True}}
    start, first, usage = time.perf_counter(), None, {}
    for line in post("/v1/chat/completions", body):
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content") and first is None:
                first = time.perf_counter() - start
            usage = chunk.get("usage") or usage
    return first, usage


cold, usage = first_token("Who kept the station?")
print(f"{usage['prompt_tokens']} tokens, new: first token after {cold:.3f} s")
least = float("inf")
for question in ["What was counted?", "Who was the last keeper?", "Where is the lamp?"]:
    warm, usage = first_token(question)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    print(f"{usage['prompt_tokens']} tokens, {cached} shared: {warm:.3f} s, {cold / warm:.0f} times sooner")
    least = min(least, cold / warm)
if least < 20:
    sys.exit("a second question should be answered at least 20 times sooner")
