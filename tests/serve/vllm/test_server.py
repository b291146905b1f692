"""`vllm serve` answers as transformers does, alone, together, from cached prefixes, and under load with bad requests."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.serve.vllm.models import greedy_tokens, log_probabilities, make_model
from tests.serve.vllm.prompts import Prompts, random_prompts, text_prompts

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")
import aiohttp
import torch
from transformers import AutoTokenizer

pytestmark = pytest.mark.vllm
EXPORTED = os.environ.get("HYLO_SERVE_MODEL", "")  # an exported folder; a tiny random model where there is none
REQUESTS, CONCURRENT, NEW = 200, 24, 6
LONGEST = 2048 if EXPORTED else 512
XGRAMMAR = '{"backend": "xgrammar", "disable_any_whitespace": true}'  # an untrained model would write spaces without end


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return Path(EXPORTED) if EXPORTED else make_model("mla_gdn", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def prompts(folder) -> Prompts:
    """Fifty for an exported model, some with a long prefix in common; of mixed lengths, to be cut and joined."""
    return text_prompts(folder, LONGEST) if EXPORTED else random_prompts()


@pytest.fixture(scope="module")
def expected(folder, prompts) -> Prompts:
    """Greedy answers of transformers, by the prompts' names."""
    answers, gaps = greedy_tokens(folder, list(prompts.values()), NEW)
    assert min(gaps) > 1e-4, "a tie decides nothing"
    return dict(zip(prompts, answers))


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A server in processes of its own."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "hybrid", "--host",
        "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(LONGEST), "--max-num-seqs", "8",
        "--max-num-batched-tokens", "1024" if EXPORTED else "256", "--enable-prefix-caching",
        *(["--structured-outputs-config", XGRAMMAR] if EXPORTED else ["--skip-tokenizer-init"]),
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | settings, start_new_session=True)
    try:
        asyncio.run(until_healthy(f"http://127.0.0.1:{port}", server, log))
        yield f"http://127.0.0.1:{port}"
        print(log.read_text()[-1500:])
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


async def until_healthy(url: str, server: subprocess.Popen, log: Path) -> None:
    begin = time.monotonic()
    async with aiohttp.ClientSession() as session:
        while True:
            assert server.poll() is None and time.monotonic() - begin < 600, log.read_text()[-4000:]
            try:
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(1)


def body(prompt: list[int] | str, **changes) -> dict:
    asked = {
        "model": "hybrid",
        "prompt": prompt,
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return asked | changes


async def answer(session, url: str, prompt: list[int]) -> list[int]:
    async with session.post(f"{url}/v1/completions", json=body(prompt)) as response:
        content = await response.json()
        assert response.status == 200, content
        return content["choices"][0]["token_ids"]


async def status(session, url: str, **request) -> int:
    async with session.post(f"{url}/v1/completions", **request) as response:
        await response.read()
        return response.status


async def disconnect(url: str, prompt: list[int]) -> None:
    """Send a request and close the connection before the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    content = json.dumps(body(prompt, max_tokens=200)).encode()
    header = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    writer.write(header.encode() + content)
    await writer.drain()
    await asyncio.sleep(0.3)
    writer.close()


async def cancel(session, url: str, prompt: list[int]) -> None:
    """Read the first token of a stream and close it."""
    async with session.post(f"{url}/v1/completions", json=body(prompt, max_tokens=200, stream=True)) as response:
        assert response.status == 200
        await response.content.readline()
        response.close()


async def request(session, url: str, i: int, prompts: Prompts, expected: Prompts) -> str:
    """Send request i, five of ten are good; return what it was, or what was wrong."""
    name, kind = list(prompts)[i % len(prompts)], i % 10
    prompt = prompts[name]
    if kind == 0:
        found = await status(session, url, json=body([5] * (LONGEST + 1)))
        return "too long" if found == 400 else f"too long a prompt was answered by {found}"
    if kind == 1:
        found = await status(
            session, url, data=b'{"model": "hybrid", "prompt": [1, 2', headers={"Content-Type": "application/json"}
        )
        return "malformed" if 400 <= found < 500 else f"half a JSON was answered by {found}"
    if kind == 2:
        found = await status(session, url, json=body(prompt, temperature="hot", max_tokens=-3))
        return "wrong settings" if 400 <= found < 500 else f"a temperature 'hot' was answered by {found}"
    if kind == 3:
        await disconnect(url, prompt)
        return "disconnected"
    if kind == 4:
        await cancel(session, url, prompt)
        return "cancelled"
    found = await answer(session, url, prompt)
    return "right" if found == expected[name] else f"{name}: {found}"


def client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(1800))


async def metric(session, url: str, *names: str) -> float:
    """Sum of the metrics of these names."""
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] in names)


async def together(url: str, prompts: Prompts) -> Prompts:
    async with client() as session:
        return dict(zip(prompts, await asyncio.gather(*(answer(session, url, prompt) for prompt in prompts.values()))))


async def one_by_one(url: str, prompts: Prompts) -> tuple[Prompts, float]:
    """Answers, and how many tokens of the prompts were found cached."""
    async with client() as session:
        before = await metric(session, url, "vllm:prefix_cache_hits_total")
        found = {name: await answer(session, url, prompt) for name, prompt in prompts.items()}
        return found, await metric(session, url, "vllm:prefix_cache_hits_total") - before


def test_completions_equal_transformers(url, prompts, expected):
    """At once, so that prompts are joined and cut to the steps' tokens; then one by one, when prefixes are cached."""
    begin = time.monotonic()
    joined = asyncio.run(together(url, prompts))
    alone, cached = asyncio.run(one_by_one(url, prompts))
    for name in prompts:
        right = {"together": joined[name] == expected[name], "alone": alone[name] == expected[name]}
        print(f"{'right' if all(right.values()) else right}: {name}")
    print(f"{len(prompts)} prompts twice in {time.monotonic() - begin:.0f} s, {cached:.0f} of their tokens cached")
    assert joined == expected and alone == expected
    assert cached > 0


async def load(url: str, prompts: Prompts, expected: Prompts) -> list[str]:
    slots = asyncio.Semaphore(CONCURRENT)
    async with client() as session:

        async def one(i: int) -> str:
            async with slots:
                return await request(session, url, i, prompts, expected)

        outcomes = await asyncio.gather(*(one(i) for i in range(REQUESTS)))
        waiting = "vllm:num_requests_running", "vllm:num_requests_waiting"
        for _ in range(120):
            if not await metric(session, url, *waiting):
                break
            await asyncio.sleep(1)
        assert not await metric(session, url, *waiting), "requests of clients that left are still computed"
        async with session.get(f"{url}/health") as response:
            assert response.status == 200
    return outcomes


def test_a_server_under_load_stays_healthy_and_right(url, prompts, expected):
    begin, short = time.monotonic(), dict(list(prompts.items())[:20])
    outcomes = asyncio.run(load(url, short, expected))
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    print(f"\n{REQUESTS} requests, {CONCURRENT} at a time, in {time.monotonic() - begin:.0f} s: {counts}")
    assert counts == {
        "right": 100,
        **dict.fromkeys(("cancelled", "disconnected", "malformed", "too long", "wrong settings"), 20),
    }
    assert asyncio.run(together(url, short)) == {name: expected[name] for name in short}


RIVER = {
    "type": "object",
    "properties": {"name": {"enum": ["Rhine", "Po"]}, "length": {"type": "integer", "minimum": 1, "maximum": 9999}},
    "required": ["name", "length"],
    "additionalProperties": False,
}


@pytest.mark.skipif(not EXPORTED, reason="structures need a tokenizer: HYLO_SERVE_MODEL=FOLDER of an exported model")
@pytest.mark.parametrize(
    "structure", [{"choice": ["blue", "green"]}, {"json": RIVER}], ids=lambda structure: next(iter(structure))
)
def test_structured_outputs(url, structure):
    async def ask() -> str:
        asked = {"model": "hybrid", "prompt": "A river, as JSON:", "max_tokens": 64, "structured_outputs": structure}
        async with client() as session, session.post(f"{url}/v1/completions", json=asked) as response:
            return (await response.json())["choices"][0]["text"]

    text = asyncio.run(ask())
    if "choice" in structure:
        assert text in structure["choice"]
    else:
        river = json.loads(text)
        assert river["name"] in ("Rhine", "Po") and 1 <= river["length"] <= 9999 and len(river) == 2


@pytest.mark.skipif(not EXPORTED, reason="a beam search needs a tokenizer: HYLO_SERVE_MODEL=FOLDER of an exported model")
def test_beam_search_begins_with_the_greedy_answer_or_a_better_one(url, folder):
    prompt = "The capital of France is"

    async def ask(**changes) -> list[list[int]]:
        async with client() as session, session.post(f"{url}/v1/completions", json=body(prompt, **changes)) as response:
            content = await response.json()
            assert response.status == 200, content
            return [choice["token_ids"] for choice in content["choices"]]

    greedy, beams = asyncio.run(ask())[0], asyncio.run(ask(use_beam_search=True, n=4))
    assert len({tuple(beam) for beam in beams}) == 4 and all(len(beam) == NEW for beam in beams)
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(prompt, add_special_tokens=False).input_ids
    answers = [greedy, *beams]
    every = log_probabilities(folder, torch.float32, "cpu", [ids] * 5, answers)
    least, *scores = (float(at.gather(1, torch.tensor(answer)[:, None]).sum()) for at, answer in zip(every, answers))
    assert scores == sorted(scores, reverse=True) and scores[0] > least - 1e-3


@pytest.mark.skipif(not EXPORTED, reason="a chat needs a tokenizer: HYLO_SERVE_MODEL=FOLDER of an exported model")
def test_a_chat_is_answered_by_tokens_of_the_same_template(url, folder):
    messages = [{"role": "user", "content": "Name three rivers."}]
    ids = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        .apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        .input_ids
    )
    asked = {"model": "hybrid", "messages": messages, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}

    async def ask() -> dict:
        async with client() as session, session.post(f"{url}/v1/chat/completions", json=asked) as response:
            return await response.json()

    content = asyncio.run(ask())
    assert content["prompt_token_ids"] == ids
    answers, _ = greedy_tokens(folder, [ids], NEW)
    found = content["choices"][0]["token_ids"]
    assert found == answers[0][: len(found)]
