//! Whether pinning can pay: how unevenly experts are used, and how much of that carries over to text not seen.
