"""Pure maths of diffusion and flow matching: tensors in, tensors out; imports torch alone."""
