"""The official OpenAI client against a server. Argument: its URL."""
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers."}]

whole = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=24, seed=1, n=1,
                                       logprobs=True, top_logprobs=2)
text = whole.choices[0].message.content
assert text and whole.usage.completion_tokens <= 24 and whole.choices[0].finish_reason in ("stop", "length")
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2

pieces, usage = [], None
for chunk in client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=24, stream=True,
                                            stream_options={"include_usage": True}):
    if chunk.choices and chunk.choices[0].delta.content:
        pieces.append(chunk.choices[0].delta.content)
    usage = chunk.usage or usage
assert len(pieces) > 1 and usage.prompt_tokens == whole.usage.prompt_tokens

stopped = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=24, stop=[text.split()[1]])
assert stopped.choices[0].finish_reason == "stop" and text.split()[1] not in stopped.choices[0].message.content
sampled = [client.chat.completions.create(model=model, messages=question, temperature=0.9, top_p=0.95, seed=7, max_tokens=12,
                                          frequency_penalty=0.3, presence_penalty=0.2, extra_body={"top_k": 40, "min_p": 0.02})
           for _ in range(2)]
assert sampled[0].choices[0].message.content == sampled[1].choices[0].message.content

done = client.completions.create(model=model, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=1)
assert "Paris" in done.choices[0].text and len(done.choices[0].logprobs.tokens) == done.usage.completion_tokens
streamed = client.completions.create(model=model, prompt="The capital of France is", temperature=0, max_tokens=4, stream=True)
assert "".join(c.choices[0].text for c in streamed if c.choices) == done.choices[0].text


def refused(kind, status, **request):
    try:
        client.chat.completions.create(**{"model": model, "messages": question, **request})
    except kind as e:
        assert e.status_code == status and e.body["message"], e
    else:
        raise AssertionError(f"{str(request)[:200]} was taken")


refused(openai.NotFoundError, 404, model="gpt-4")
refused(openai.BadRequestError, 400, messages=[])
refused(openai.BadRequestError, 400, messages=[{"role": "wizard", "content": "x"}])
refused(openai.BadRequestError, 400, max_tokens=10**9)
refused(openai.BadRequestError, 400, temperature=-1)
refused(openai.BadRequestError, 400, n=2)
refused(openai.BadRequestError, 400, messages=[{"role": "user", "content": "many words " * 8000}])
print("the client is content:", text.replace("\n", " ")[:60])
