import type { Turn } from '../lib/talk'

let clock = 0
/** A turn of a conversation, later than those made before it; a question where its id begins with q. */
export const turn = (id: string, parent: string | null, text = id): Turn => ({
  id,
  talk: 't',
  parent,
  role: id.startsWith('q') ? 'user' : 'assistant',
  text,
  at: clock++,
  answer: null,
})
