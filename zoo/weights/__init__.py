"""Weights in and out: official state dicts, safetensors, npz and Orbax folders."""
