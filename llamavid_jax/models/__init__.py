"""The modules of LLaMA-VID in order: `vision`, `text_decoder`, `visual_tokens`, `llama`, `llama_vid`.

Letters of every shape and einsum in this package:

    B conversations   F frames            P patches (257 with CLS, 256 without, at 224 px)   Q queries (32)
    T text/sequence   S cache length      D LLM width (4096)     E vision width (1408)       C Q-Former width (768)
    N heads           K key-value heads   H head size            M MLP width                 V vocabulary   L layers
"""
