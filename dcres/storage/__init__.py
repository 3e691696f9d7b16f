"""What a checkpoint is on disk; usable without Ray and without QEMU. See docs/format.md."""
