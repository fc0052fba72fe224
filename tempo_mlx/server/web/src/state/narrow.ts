import { MediaQuery } from 'svelte/reactivity'

/** so narrow that what is needed now and then goes behind a button */
export const narrow = new MediaQuery('max-width: 480px')
