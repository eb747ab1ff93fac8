"""Commands for finished models: predict, evaluate, fuse, distill, onnx."""
