"""`python -m conserve_lab.vllm .venv-vllm` makes the environment in which real vLLM runs."""

from conserve_lab.vllm.install import main

if __name__ == "__main__":
    raise SystemExit(main())
