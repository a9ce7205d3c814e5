"""Dropping visual tokens: families of vision-language models, what their encoders show, and a decoder that runs on fewer tokens."""
