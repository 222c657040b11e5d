"""Replicas of an EaModel on Ray Serve, behind an OpenAI-compatible route.

    pip install 'ray[serve]' openai
    python examples/ray_serve.py --replicas 2                               # the demo's pair, on CPUs
    python examples/ray_serve.py --model MODEL --head HEAD --gpus 1         # a GPU for each replica

and in another terminal

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    chat = [{"role": "user", "content": "Name three uses of a brick."}]
    print(client.chat.completions.create(model="eagle", messages=chat).choices[0].message.content)

Ray spreads requests over the replicas, on one machine or a cluster. A replica decodes one request after the other.
Taken of a request: messages, max_tokens, temperature, top_p, seed, stream. `usage.tau` is beyond OpenAI's fields:
tokens per round.
"""

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from ray import serve

from eagle_fast import EaModel
from eagle_fast.demo import load
from eagle_fast.typewriter import Pieces

app = FastAPI()
NAME = "eagle"


def finish(generation: Any, most: int) -> str:
    return "length" if generation.statistics.new_tokens[0] >= most else "stop"


def usage(generation: Any, ids: torch.Tensor) -> dict:
    prompt, new = ids.shape[1], generation.statistics.new_tokens[0]
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {**counts, "tau": round(generation.statistics.tau, 2)}


@serve.deployment
@serve.ingress(app)
class Eagle:
    """One replica: a model with its head."""

    def __init__(self, model: str | None, head: str | None, threads: int):
        torch.set_num_threads(threads)
        if model is None:
            self.model, self.tokenizer = load("auto")
            return
        place: dict[str, Any] = {"device_map": "cuda", "dtype": torch.bfloat16}
        if not torch.cuda.is_available():
            place = {"device_map": "cpu", "dtype": torch.float32}
        self.model = EaModel.from_pretrained(base_model_path=model, ea_model_path=head, **place)
        self.tokenizer = self.model.tokenizer
        self.model.warmup()

    @app.get("/v1/models")
    def models(self) -> dict:
        return {"object": "list", "data": [{"id": NAME, "object": "model", "created": 0, "owned_by": "eagle_fast"}]}

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Any:
        asked = await request.json()
        try:
            ids = self.tokenizer.apply_chat_template(
                asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            new = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 256)
            options = {
                "temperature": asked.get("temperature", 0.0), "top_p": asked.get("top_p") or 0.0,
                "seed": asked.get("seed"), "max_new_tokens": new, "max_length": ids.shape[1] + new,
            }  # fmt: skip
            rounds = self.model.ea_generate(ids, return_dict_in_generate=True, **options)
        except (KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, str(error)) from error
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": NAME}
        if asked.get("stream"):
            return StreamingResponse(self.stream(rounds, ids, head, new), media_type="text/event-stream")
        text, last = await asyncio.to_thread(self.whole, rounds, ids)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish(last, new)}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(last, ids)}

    def whole(self, rounds: Iterator[Any], ids: torch.Tensor) -> tuple[str, Any]:
        """The whole text, and what it took."""
        found = list(self.texts(rounds, ids))
        return "".join(text for text, _ in found), found[-1][1]

    def texts(self, rounds: Iterator[Any], ids: torch.Tensor) -> Iterator[tuple[str, Any]]:
        """(new text, what there is so far) after each round."""
        pieces = Pieces(self.tokenizer)
        for generation in rounds:
            new = generation.sequences[0, ids.shape[1] :].tolist()
            yield "".join(text for text, _ in pieces.take(new)), generation

    def stream(self, rounds: Iterator[Any], ids: torch.Tensor, head: dict, most: int) -> Iterator[str]:
        """Server-sent events."""

        def event(delta: dict, reason: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice], **more})}\n\n"

        yield event({"role": "assistant", "content": ""})
        last = None
        for piece, last in self.texts(rounds, ids):  # noqa: B007  # the last one is used
            yield event({"content": piece})
        yield event({}, finish(last, most), usage=usage(last, ids))
        yield "data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the target; default: the demo's")
    parser.add_argument("--head", help="of its draft head")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--threads", type=int, default=1, help="of each replica, on a CPU")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if (args.model is None) != (args.head is None):
        parser.error("give --model and --head together, or neither for the demo's pair")
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    resources = {"num_gpus": args.gpus, "num_cpus": 0 if args.gpus else args.threads}
    replicas = Eagle.options(num_replicas=args.replicas, ray_actor_options=resources)
    serve.run(replicas.bind(args.model, args.head, args.threads), blocking=True)


if __name__ == "__main__":
    main()
