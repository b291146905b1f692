"""What ranks exchange inside a layer when the sequence is split over them."""
