"""Starts SGLang on a model, asks it two questions and prints what it says.

    python examples/quickstart.py [MODEL]

MODEL is a folder or a hub name; without one, a tiny random model is made. It talks nonsense.
"""

import sys
import tempfile

from tensordict import TensorDict
from tiny_model import make_tiny_model
from torchrl.data.llm import History

from torchrl_sglang import AsyncSGLang, SGLangWrapper

QUESTIONS = ["What does the fox jump over?", "Count to three."]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1] if len(sys.argv) > 1 else str(make_tiny_model(folder))
        with AsyncSGLang.from_pretrained(model) as service:
            policy = SGLangWrapper(service, generate_kwargs={"max_new_tokens": 16})
            chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
            prompts = TensorDict({("history", "prompt"): History.from_chats(chats)}, [len(chats)])
            for question, row in zip(QUESTIONS, policy(prompts).unbind(0), strict=True):
                print(question, "->", repr(row["text"].response))
                print("  log-probs:", [round(p, 2) for p in row["log_probs"].response.tolist()])


if __name__ == "__main__":
    main()
