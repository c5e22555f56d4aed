// Clears what one inclusion of simd.h and the kernels defined; see foreach_isa.h.
#undef BBB_ISA
#undef BBB_WIDTH
#undef BBB_GROUP
#undef BBB_LANES
#undef BBB_MASK
#undef BBB_SHUFFLE
