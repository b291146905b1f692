"""Where a teacher's hidden states come from: the same ranks, a store on disk, or another job."""
