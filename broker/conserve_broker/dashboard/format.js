// Numbers and times for people. Units last.

export const whole = (number) => Math.round(number).toLocaleString("en-US");

export function tokens(number) {
  if (number < 10_000) return whole(number);
  if (number < 1_000_000) return `${(number / 1_000).toFixed(number < 100_000 ? 1 : 0)}k`;
  return `${(number / 1_000_000).toFixed(number < 10_000_000 ? 2 : 1)}M`;
}

export function span(ms) {
  const seconds = Math.max(ms, 0) / 1000;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const percent = (part, all) => (all > 0 ? `${Math.round((100 * part) / all)}\u00a0%` : "–");

export const rate = (perMinute) => (perMinute < 10 ? perMinute.toFixed(1).replace(".0", "") : whole(perMinute));

export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

export const count = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;
