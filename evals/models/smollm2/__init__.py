"""SmolLM2-135M-Instruct, the embedded default. See card.md."""
