"""Whole models: configuration, presets, modality encoders, the multimodal decoder, initialisation, generation."""
