"""Sources of a teacher's hidden states: a store on disk, or a job on other ranks."""
