"""The recurrent operations of the supported models, one public function each, and the seam that puts them under a model.

Every operation has a `reference.py` in plain PyTorch that reads like its paper and is differentiable in every input.
"""
