"""What the server does under load, and what it costs when there is none.

    python -m benchmarks.server_load load --model DIR        50 clients, a third of them leaving at random
    python -m benchmarks.server_load overhead --model DIR    steps of one client, against the Python API
    python -m benchmarks.server_load together --model DIR    tokens a second of 8 clients, against one client

`load` starts a server and checks: every surviving answer is the one an unloaded server gives with the same seed; no
place stays taken; memory returns; /health answers within 200 ms (99th percentile) while decoding; a full queue says
503; and, with --kill, that a worker killed in the middle is replaced within 10 s. `overhead` takes turns between a
client of the server and the API in this process, prompt by prompt. `together` takes turns between one client and
several that ask at once, and checks that each is answered as it is alone. Loopback only. Prints a table, then one line
of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import Served, events, serving

PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "I went to the",
    "Hello",
    "A short story about a fox: ",
]
FLAGS = ["--concurrency", "4", "--queue-size", "16", "--log-level", "warning", "--max-tokens-limit", "100000"]


def work(index: int, longest: int) -> dict[str, Any]:
    """Request number `index`: a prompt, a length, and other settings, all following from the number."""
    choose = random.Random(index)
    body: dict[str, Any] = {"prompt": choose.choice(PROMPTS) * choose.choice((1, 1, 1, 20)), "seed": index}
    body["max_tokens"] = choose.choice((2, 5, 10, 20, longest))
    body.update(
        choose.choice(({}, {"threshold": 0.05}, {"decoder": "plain"}, {"use_retroactive_pruning": True}))
    )
    return body


def answer(run: dict[str, Any]) -> Any:
    """What must be equal: everything chosen (numbers of a step depend on nothing but the request)."""
    return [
        [(token["id"], token["slot"], token["removed_after"]) for token in step["tokens"]]
        for step in run["steps"]
    ]


class Load:
    def __init__(self, served: Served, seconds: float, longest: int) -> None:
        self.served, self.longest, self.end = served, longest, time.monotonic() + seconds
        self.outcomes: Counter[str] = Counter()
        self.answers: dict[int, Any] = {}
        self.numbers = iter(range(10**9))
        self.problems: list[str] = []

    async def client(self, http: httpx.AsyncClient, dice: random.Random, leaves: bool) -> None:
        """One client: request after request; one that leaves does so at a random moment."""
        while time.monotonic() < self.end:
            number = next(self.numbers)
            ask = self.stream if number % 2 else self.whole
            patience = dice.expovariate(1 / 0.3) if leaves else None
            try:
                outcome, run = await asyncio.wait_for(ask(http, work(number, self.longest)), patience)
            except asyncio.TimeoutError:
                self.outcomes["left"] += 1
                continue
            except httpx.TransportError as error:
                self.outcomes["broken"] += 1
                self.problems.append(repr(error))
                continue
            self.outcomes[outcome] += 1
            if run is not None:
                self.answers[number] = answer(run)
            if outcome == "queue_full":
                await asyncio.sleep(dice.uniform(0.05, 0.5))

    async def whole(self, http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, Any]:
        response = await http.post("/generate", json=body)
        if response.status_code == 200:
            return "ok", response.json()
        return response.json()["error"]["code"], None

    async def stream(self, http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, Any]:
        async with http.stream("POST", "/generate/stream", json=body) as response:
            if response.status_code != 200:
                return json.loads(await response.aread())["error"]["code"], None
            name, data = list(events(iter([line async for line in response.aiter_lines()])))[-1]
            return ("ok", data) if name == "run" else (data["error"]["code"], None)

    async def kill(self, http: httpx.AsyncClient, after: float) -> float:
        """Kill the worker; seconds until the server is well again."""
        await asyncio.sleep(after)
        os.kill((await http.get("/health")).json()["worker"]["pid"], signal.SIGKILL)
        begun = time.monotonic()
        while True:
            await asyncio.sleep(0.02)
            health = (await http.get("/health")).json()
            if health["status"] == "ok" and health["worker"]["restarts"]:
                return time.monotonic() - begun

    async def run(self, clients: int, kill_after: float | None) -> float | None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.served.url, timeout=120, limits=limits) as http:
            tasks = [self.client(http, random.Random(i), leaves=i % 3 == 0) for i in range(clients)]
            killing = None if kill_after is None else asyncio.ensure_future(self.kill(http, kill_after))
            await asyncio.gather(*tasks)
            return None if killing is None else await killing


def watch(url: str, seconds: float, results: Any) -> None:
    """In a process of its own, so that the clients' work does not count: seconds that each /health took."""
    times, end = [], time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as http:
        while time.monotonic() < end:
            begun = time.perf_counter()
            http.get("/health")
            times.append(time.perf_counter() - begun)
            time.sleep(0.02)
    results.put(times)


def memory(served: Served) -> int:
    """Bytes that server and worker hold (Linux)."""
    return sum(int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") for text in processes(served, "statm"))


def cpu_seconds(served: Served) -> float:
    """Processor time that server and worker have used (Linux)."""
    fields = [text.rsplit(")", 1)[1].split() for text in processes(served, "stat")]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def processes(served: Served, file: str) -> list[str]:
    pids = (served.process.pid, served.health()["worker"]["pid"])
    return [path.read_text() for pid in pids if (path := Path(f"/proc/{pid}/{file}")).exists()]


def load(model: str, clients: int, seconds: float, longest: int, kill: bool, warm: float) -> dict[str, Any]:
    with serving(model, *FLAGS) as served:
        asyncio.run(
            Load(served, warm, longest).run(clients, None)
        )  # what is allocated once, is allocated now
        served.wait_until(lambda health: health["running"] == health["waiting"] == 0, 60)
        before = memory(served)
        spawn = multiprocessing.get_context("spawn")
        results = spawn.Queue()
        watcher = spawn.Process(target=watch, args=(served.url, seconds, results))
        watcher.start()
        test = Load(served, seconds, longest)
        recovery = asyncio.run(test.run(clients, seconds / 2 if kill else None))
        health = results.get(timeout=60)
        watcher.join()
        begun = time.monotonic()
        served.wait_until(lambda health: health["running"] == health["waiting"] == 0, 30)
        freed = time.monotonic() - begun
        after = memory(served)
        differing = []
        sample = random.Random(0).sample(sorted(test.answers), min(60, len(test.answers)))
        for number in sample:
            response = served.post("/generate", work(number, longest))
            if answer(response.json()) != test.answers[number]:
                differing.append(number)
        quantiles = statistics.quantiles(health, n=100)
        return {
            "clients": clients,
            "seconds": seconds,
            "outcomes": dict(test.outcomes),
            "problems": test.problems[:5],
            "answers_compared": len(sample),
            "answers_differing": differing,
            "health_ms": {"median": 1e3 * quantiles[49], "p99": 1e3 * quantiles[98], "asked": len(health)},
            "memory_mb": {
                "before": before / 1e6,
                "after": after / 1e6,
                "growth": after / before - 1 if before else 0.0,
            },
            "places_free_after_seconds": freed,
            "recovery_seconds": recovery,
            "steps_per_second": served.metric("tempo_steps_total") / (seconds + warm),
        }


def overhead(model: str, steps: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step, through the server and in this process, in turns."""
    import tempo_mlx

    loaded = tempo_mlx.load(model)
    body = {"max_tokens": steps, "min_steps": steps}
    api: list[float] = []
    server: list[float] = []
    ratios: list[float] = []
    cpu = {"api": 0.0, "server": 0.0}
    with serving(model, *FLAGS) as served, served.client() as http:
        for index in range(rounds + 1):
            prompt = PROMPTS[index % len(PROMPTS)]
            mine, theirs = [], []
            for way in random.Random(index).sample(("api", "server"), 2):
                at = None
                if way == "api":
                    before = time.process_time()
                    for _ in tempo_mlx.stream(loaded, prompt, **body):
                        now = time.perf_counter()
                        mine += [now - at] if at else []
                        at = now
                    cpu["api"] += time.process_time() - before if index else 0
                    continue
                before = cpu_seconds(served)
                with http.stream("POST", "/generate/stream", json={"prompt": prompt, **body}) as response:
                    for name, _ in events(response.iter_lines()):
                        if name == "step":
                            now = time.perf_counter()
                            theirs += [now - at] if at else []
                            at = now
                cpu["server"] += cpu_seconds(served) - before if index else 0
            if index:  # the first round warms up
                api += mine
                server += theirs
                ratios.append(sum(theirs) / sum(mine))
    low, high = sorted(ratios)[0], sorted(ratios)[-1]
    return {
        "steps": len(api),
        "api_ms": 1e3 * statistics.median(api),
        "server_ms": 1e3 * statistics.median(server),
        "ratio_median_of_rounds": statistics.median(ratios),
        "ratio_range": [low, high],
        "cpu_ratio": cpu["server"] / cpu["api"]
        if cpu["server"]
        else None,  # counts also where others are busy
    }


async def answered(url: str, bodies: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """Seconds until all of them, asked at once, were answered; their texts."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        begun = time.perf_counter()
        found = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
        return time.perf_counter() - begun, [each.json()["choices"][0]["text"] for each in found]


def together(model: str, clients: int, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of one client and of several, in turns: greedy texts of `steps` tokens, of different prompts."""
    settings = {"max_tokens": steps, "temperature": 0, "tempo": {"min_steps": steps, "decoder": "plain"}}
    bodies = [{"prompt": f"{PROMPTS[i % len(PROMPTS)]} {i}", **settings} for i in range(clients)]
    seconds: dict[int, list[float]] = {1: [], clients: []}
    cpu: dict[int, float] = dict.fromkeys(seconds, 0.0)
    texts: dict[int, list[str]] = {}
    with serving(model, *FLAGS[2:], "--concurrency", str(clients)) as served:
        for index in range(rounds + 1):
            one = index % clients
            for count, asked in random.Random(index).sample(
                [(1, bodies[one : one + 1]), (clients, bodies)], 2
            ):
                before = cpu_seconds(served)
                took, texts[count] = asyncio.run(answered(served.url, asked))
                if index:  # the first round warms up
                    seconds[count].append(took)
                    cpu[count] += cpu_seconds(served) - before
            assert texts[1][0] == texts[clients][one], "a text is another among others than alone"
    ratios = [clients * one / many for one, many in zip(*seconds.values(), strict=True)]
    return {
        "clients": clients,
        "tokens_each": steps,
        "rounds": rounds,
        "one_tokens_per_second": round(steps / statistics.median(seconds[1]), 1),
        "all_tokens_per_second": round(clients * steps / statistics.median(seconds[clients]), 1),
        "ratio_median_of_rounds": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "cpu_ratio": round(clients * cpu[1] / cpu[clients], 2)
        if cpu[1]
        else None,  # also where others are busy
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("load", "overhead", "together"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, help="50; of `together` 8")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--warm", type=float, default=10)
    parser.add_argument("--longest", type=int, default=60, help="steps of the longest requests")
    parser.add_argument("--kill", action="store_true", help="kill the worker in the middle")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    if given.what == "load":
        result = load(given.model, given.clients or 50, given.seconds, given.longest, given.kill, given.warm)
    elif given.what == "together":
        result = together(given.model, given.clients or 8, given.steps, given.rounds)
    else:
        result = overhead(given.model, given.steps, given.rounds)
    for name, value in result.items():
        print(f"{name:28} {value}")
    print(json.dumps({"benchmark": f"server_{given.what}", "model": Path(given.model).name, **result}))


if __name__ == "__main__":
    main()
